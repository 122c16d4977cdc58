/* What the operators of the library are, and the one call by which a device runs them. */
#ifndef NORMFUSE_OPS_H
#define NORMFUSE_OPS_H

#include <stddef.h>
#include <stdint.h>

enum { OP_NORM, OP_ADD_NORM, OP_NORM_ADD, OP_NORM_ADD_NORM, OP_QK_NORM, OP_SOFTMAX };
enum { F32, F16, BF16 };

/* An operator, as its name has it. With n = h / sqrt(mean(h^2) + eps), h = x or x - mean(x) (`layer`), in `compute`:
 *   first:  n rounded to the type of x, then * weight + bias in `result` where that differs from x, else in x
 *   else:   n * weight + bias in `compute`, then rounded to `result`
 * Weight and bias are of the type that they are applied in, with a rounding to it after each step: see nf_affine.
 * `unrounded`: the sum of an OP_ADD_NORM is normalised before it is rounded to the type of x.
 * `has_mask`: an OP_SOFTMAX, of which x alone means anything else here, is one of x + mask; `scaled`: of scale * x; `half`:
 * x is one of float16, if in float32, and so is the result.
 * `has_x_bias`: its x is x + x_bias, rounded to the type of x but where the sum is not. */
typedef struct {
  int op, layer, x, compute, first, result, has_w1, has_b1, has_w2, has_b2, unrounded, has_x_bias, has_mask, scaled, half;
} Spec;

/* The type of weights and biases. */
static inline int nf_affine(const Spec *spec) { return spec->first ? spec->result : spec->compute; }

/* The tensors of a call; all rows are contiguous, of length n, m of them.
 *   OP_NORM           y = norm(x)
 *   OP_ADD_NORM       s = x + r, y = norm(s)                  r, s of the type of x
 *   OP_NORM_ADD       s = r + norm(x)                         r, s of the type `result`; y is NULL
 *   OP_NORM_ADD_NORM  s = r + norm1(x), y = norm2(s)          w2, b2 those of norm2; `result` is the type of x
 *   OP_QK_NORM        y = norm1(x), y2 = norm2(x2)            m2 rows of length n2, w2, b2 those of norm2
 * A weight or bias that is not there is NULL; each has the length of its rows, and x_bias the type of x. A result may lie where an input of the
 * same place lies (y on x, s on r, y2 on x2) on the CPU only. */
typedef struct {
  void *stream;
  const void *x, *r, *x_bias;
  void *y, *s;
  const void *w, *b, *w2, *b2;
  long long m, n;
  const void *x2;
  void *y2;
  long long m2, n2;
  float eps;
} Args;

/* Rows begin..end of a call, on the thread that calls; rows of x2 follow those of x. Weights and biases are float
 * here, whatever `spec` says. `scratch` holds max(n, n2) floats. */
void nf_cpu_rows(const Spec *spec, const Args *args, long long begin, long long end, float *scratch);

/* One row y = softmax(by * x + r), of by * x + number without r, from the type of x to that of y; `scratch` holds n + 16
 * floats. What would be a denormal number of float is 0: those that are masked would take many times as long on Intel's
 * processors, here and in the product that reads them. A row of nothing but -inf is 1/n, so that nothing spreads from it, and
 * no numbers where the values are `half` ones, as in what ONNX Runtime runs for these. */
void nf_cpu_softmax(int from, const void *x, float by, const float *r, float number, int half, int to, void *y, long long n,
                    float *scratch);

/* A row of another type as floats. */
void nf_cpu_load(int type, const void *from, float *to, long long n);

/* The instruction set that the rows run on. */
const char *nf_cpu_isa(void);

#ifdef NORMFUSE_CUDA
const char *nf_cuda_run(const Spec *spec, const Args *args); /* NULL when done, else a static message */
int nf_cuda_has(const Spec *spec);
#else
static inline const char *nf_cuda_run(const Spec *spec, const Args *args) {
  return (void)spec, (void)args, "built without CUDA";
}
static inline int nf_cuda_has(const Spec *spec) { return (void)spec, 0; }
#endif

#endif
