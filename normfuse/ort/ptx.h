/* The kernels that were compiled ahead of time, by normfuse/ort/aot.py. */
#ifndef NORMFUSE_PTX_H
#define NORMFUSE_PTX_H

typedef struct {
  int x, first, result;
} Types;

/* "tile": a program has rows that fit into its block; "row": one row, in blocks. */
typedef struct {
  const char *entry;
  int block, aligned;
} Form;

typedef struct {
  unsigned place, length;
  int rows, warps, shared;
} Kernel;

enum { NO_KERNEL = -1, MOST_KERNELS = 2048 };

/* The number of the kernel for rows of n, NO_KERNEL if there is none. `aligned`: rows and tensors start at multiples of
   16 bytes. OP_QK_NORM is no operator here, and an add_norm of the unrounded sum is one of its own. */
enum { ADD_NORM_UNROUNDED = OP_QK_NORM };
int nf_ptx_find(int op, int layer, const Types *types, long long n, int aligned);

/* The architecture whose code runs on a GPU of a compute capability (times ten), -1 if there is none. */
int nf_ptx_architecture(int capability);

const Form *nf_ptx_form(int number);
const Kernel *nf_ptx_kernel(int architecture, int number);

/* The PTX of a kernel, for the caller to free; NULL if memory is short. */
char *nf_ptx_text(int architecture, int number);

#endif
