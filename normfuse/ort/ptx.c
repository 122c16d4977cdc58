/* The table of kernels and their texts, packed by normfuse/ort/aot.py in two steps, undone here.

   A pack is, by turns, a length and so many new letters, a distance and a length to repeat from there. The numbers are
   to the base 28, their lowest digit first: '@' and on, the last one '#' and on. A text so unpacked has its registers
   numbered back from the next new one of their kind. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ops.h"
#include "ptx.h"

typedef struct {
  int chunk, size;
} Pack;

#include "ptx_data.h"

typedef char all_kernels_fit[OPS * 2 * TYPES * FORMS <= MOST_KERNELS ? 1 : -1];

int nf_ptx_find(int op, int layer, const Types *wanted, long long n, int aligned) {
  for (int type = 0; type < TYPES; type++) {
    if (memcmp(&types[type], wanted, sizeof *wanted) != 0)
      continue;
    int first = ((op * 2 + (layer != 0)) * TYPES + type) * FORMS;
    for (int form = 0; form < FORMS; form++) {
      int fits = forms[form].entry[0] == 'r' || forms[form].block >= n;
      if (fits && forms[form].aligned <= aligned && nf_ptx_kernel(0, first + form)->length > 0)
        return first + form;
    }
  }
  return NO_KERNEL;
}

int nf_ptx_architecture(int capability) {
  int found = -1;
  for (int i = 0; i < ARCHITECTURES && architectures[i] <= capability; i++)
    found = i;
  return found;
}

const Form *nf_ptx_form(int number) {
  return &forms[number % FORMS];
}

const Kernel *nf_ptx_kernel(int architecture, int number) {
  return &kernels[architecture * OPS * 2 * TYPES + number / FORMS][number % FORMS];
}

/* -- texts --------------------------------------------------------------------------------------------------------- */

typedef struct {
  const char *const *chunk, *next;
} Reader;

static int letter(Reader *in) {
  if (*in->next == 0)
    in->next = *++in->chunk;
  return *in->next++;
}

static size_t number(Reader *in) {
  size_t value = 0, unit = 1;
  int digit = letter(in);
  for (; digit >= '@'; digit = letter(in), unit *= 28)
    value += (size_t)(digit - '@') * unit;
  return value + (size_t)(digit - '#') * unit;
}

static void unpack(const Pack *pack, char *out, size_t end) {
  Reader in = {&chunks[pack->chunk], chunks[pack->chunk]};
  size_t size = 0;
  while (size < end) {
    for (size_t fresh = number(&in); fresh > 0; fresh--)
      out[size++] = (char)letter(&in);
    if (size >= end)
      break;
    size_t distance = number(&in);
    for (size_t again = number(&in); again > 0; again--, size++)
      out[size] = out[size - distance];
  }
}

static void number_registers(const char *text, size_t length, char *out) {
  int newest[128] = {0};
  const char *end = text + length;
  while (text < end) {
    const char *name = text;
    *out++ = *text++;
    if (*name != '%')
      continue;
    while (text < end && *text >= 'a' && *text <= 'z')
      *out++ = *text++;
    if (text == name + 1 || text == end || *text < '0' || *text > '9')
      continue;
    int *last = &newest[(int)text[-1]], back = 0;
    while (text < end && *text >= '0' && *text <= '9')
      back = back * 10 + (*text++ - '0');
    int n = *last + 1 - back;
    *last = n > *last ? n : *last;
    out += sprintf(out, "%d", n);
  }
  *out = 0;
}

char *nf_ptx_text(int architecture, int number) {
  const Kernel *kernel = nf_ptx_kernel(architecture, number);
  const Pack *pack = &packs[number / (TYPES * FORMS)];
  char *whole = malloc((size_t)pack->size), *text = malloc(3 * (size_t)kernel->length + 1);
  if (whole != NULL && text != NULL) {
    unpack(pack, whole, (size_t)pack->size);
    number_registers(whole + kernel->place, kernel->length, text);
  } else {
    free(text);
    text = NULL;
  }
  free(whole);
  return text;
}
