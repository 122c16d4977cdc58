"""What every refusal code means: `normfuse explain CODE` prints it, and a test keeps it complete.

Codes are stable: a code once given keeps its meaning. NF1xx: what was found is no norm, or is not known to be one.
NF2xx: it is a norm, and was left as it is. NF3xx: it is a LayerNorm, and was not converted to an RMSNorm.
"""

from __future__ import annotations

from typing import NamedTuple


class Code(NamedTuple):
    """A refusal in words: a title, what it means with an example, and what to change."""

    title: str
    text: str
    fix: str


CODES: dict[str, Code] = {
    "NF100": Code(
        "too complex to be a norm",
        "The formula grew past what any norm needs: more than a dozen terms, roots inside roots inside roots, or a "
        "factor beyond all numbers. "
        "Example: ((x + a)*(x + b) + c)*... before the mean is taken. NormFuse stops there, so that its time stays "
        "linear in the size of the model.",
        "Nothing, if this is not meant to be a norm. If it is, compute it in fewer steps, or with the framework's own "
        "operator.",
    ),
    "NF101": Code(
        "not divided by one root of a statistic",
        "A norm divides x by sqrt(mean square + eps) or sqrt(variance + eps), once. Here eps stands outside the root, "
        "or x meets two roots or none. Example: x / (std(x) + eps), which is not x / sqrt(var(x) + eps): "
        "for small x the two differ by orders of magnitude.",
        "Move eps under the root if the model allows it: this changes the outputs slightly and needs a check, or a "
        "short retraining. Otherwise the graph stays as it is.",
    ),
    "NF102": Code(
        "the mean is not taken away",
        "x is divided by its standard deviation, but its mean is still in it: half of a LayerNorm. "
        "Example: x * rsqrt(var(x) + eps).",
        "If a LayerNorm is meant, subtract the mean; if an RMSNorm is meant, use mean(x^2) in place of the variance.",
    ),
    "NF103": Code(
        "eps is not positive",
        "No positive constant is added under the root, so a row of zeros gives a division by zero, which the norm "
        "operators do not reproduce. Example: x * rsqrt(mean(x^2)).",
        "Add a small eps under the root, such as 1e-6, and export again. If the model has one of 1e-8 or less, the "
        "optimizer of torch.onnx.export has dropped it: export with optimize=False, or by normfuse.export.",
    ),
    "NF104": Code(
        "eps is no constant of the graph",
        "What is added under the root, or what scales the statistic, is computed at run time or varies along the "
        "normalised axes. The operators take eps as a fixed number. Example: eps as a graph input "
        "(an export with dynamic=True can do that), or one eps per channel.",
        "Make eps a Python float in the model's code, and export again.",
    ),
    "NF105": Code(
        "another power than -1/2",
        "The statistic, or x, is raised to a power that a norm does not have, or the power is not known. "
        "Examples: x / (mean(x^2) + eps) without a root, x^2 / mean(x^2), a cube root, an exponent given as an input, "
        "division by x itself.",
        "Nothing, if this is not meant to be a norm. If it is, look for a missing Sqrt at the named node.",
    ),
    "NF106": Code(
        "the statistic and the scaled tensor do not belong together",
        "A mean square or a variance was found, but what follows does not make it a norm of the same tensor over the "
        "same axes. Examples: the mean of one tensor scales another; the mean is taken over a slice or a masked copy; "
        "two axes are reduced and one is normalised; a statistic goes on into an operator such as Sigmoid; a "
        "quantiser has rounded the statistic to eight bits.",
        "Nothing, in most cases: it is no norm. If a quantiser did it, rewrite the model first and quantise that. "
        "If it is a norm mathematically, please report it with the node's neighbourhood, since NormFuse should have "
        "found it.",
    ),
    "NF107": Code(
        "a kept axis of size 1 is missing",
        "The statistic lost the axis over which it was taken, so that it lines up with another axis of x. This "
        "happens to run where x is square. Example: x of 64 x 64, ReduceMean with keepdims=0, and then a Mul.",
        "Reduce with keepdims=1 (keepdim=True in torch) if a norm is meant. As written, the model scales columns by "
        "the statistics of rows.",
    ),
    "NF108": Code(
        "the weight or bias widens the tensor",
        "A norm keeps the shape of x. Here a factor or a summand is larger than x, or is not known to fit, and the "
        "result is broadcast. Example: x of 1 x 64 with a weight of 8 x 64.",
        "Expand x before the norm, or apply the wide factor as a Mul of its own after it. If only the shapes are "
        "unknown, export with static or named sizes.",
    ),
    "NF109": Code(
        "the weight varies from row to row",
        "The weight or the bias of a norm is the same for every row. Here it runs over an axis that is not "
        "normalised. Examples: a weight per token; NCHW data normalised over W and scaled per channel.",
        "Nothing: the factor belongs after the norm, as a Mul of its own. If rows and columns were mixed up, transpose "
        "the weight.",
    ),
    "NF110": Code(
        "an unbiased variance over an unknown size",
        "var(x) with a correction divides by N - 1 and not by N. With a known N this is a LayerNorm with another "
        "weight and eps; with an unknown N it is none. Example: torch.var(x, -1) over a dynamic axis.",
        "Use unbiased=False (correction=0), or export with a fixed size of the normalised axis.",
    ),
    "NF112": Code(
        "a power of x that no norm has",
        "A norm is made of x, its mean, and the mean of its square. Here stands |x|, a third or fourth power, or the "
        "product of two values that both depend on x. Examples: mean(|x|), mean(x^4), the variance of x^2.",
        "Nothing: it is another normalisation. If a square was meant, look at the exponent of the named Pow.",
    ),
    "NF113": Code(
        "a cast that changes values",
        "The value is cast to or from an integer or a boolean on its way, which rounds or truncates. Example: int8 "
        "data normalised without being cast to float first.",
        "Cast to a floating-point type before the norm, and keep it there.",
    ),
    "NF114": Code(
        "axes known only at run time",
        "The axes of the reduction are computed, or are a graph input, so nobody can say which norm this is. Example: "
        "ReduceMean at opset 18 whose axes come from an input.",
        "Give the axes as constants, and export again.",
    ),
    "NF115": Code(
        "unknown shape",
        "The shape of a value, or the size of the normalised axis, is not known, and the algebra needs it: a sum is "
        "N times a mean only for a known N, and a weight fits only what is as wide. Example: the output of an "
        "operator from an unknown domain, without a value_info.",
        "Run shape inference on the model, or export with fixed sizes of the normalised axes.",
    ),
    "NF116": Code(
        "an inner value is used elsewhere",
        "A value inside the norm, such as its mean or its rounded intermediate result, is also a graph output or is "
        "read by another operator or a sub-graph, and the fused operator would not give it. Example: the variance "
        "returned next to the normalised tensor. So it is where the module of a norm has hooks, which see what goes in "
        "and out.",
        "Drop the extra output, use or hook if nobody needs it.",
    ),
    "NF117": Code(
        "roundings that no operator has",
        "It is a norm mathematically, but its casts stand where no operator rounds, so that fusing would change "
        "low bits. Examples: squares taken in float16 and averaged in float32; a cast between the weight and the bias; "
        "statistics in one type and the division in another; squares of x / 64 in float16, where those of x are "
        "infinite.",
        "Compute the whole norm in float32 and cast once, before the weight or after it; or let small changes happen "
        "with --numerics fast.",
    ),
    "NF119": Code(
        "a clamp that changes small values",
        "The statistic or its root is clamped from below, as in an L2 normalise. Above the clamp this is a norm "
        "without eps, below it is not. Example: x / max(norm(x), 1e-12). A clamp that never acts, such as "
        "max(var, 0), is no obstacle.",
        "Nothing, if an L2 normalise is meant. If a norm is meant, add eps under the root in place of the clamp.",
    ),
    "NF120": Code(
        "written in place",
        "Between the statistic and its use the tensor, or a view of it, is overwritten, so the two see different "
        "values. Example: m = x.pow(2).mean(-1); x.add_(1); x * torch.rsqrt(m + eps).",
        "Use the out-of-place form of the operation.",
    ),
    "NF121": Code(
        "a mean over an axis of size 1",
        "With one element in a row the mean is the element itself: the norm is a constant or a sign, and has no row "
        "to work on. Example: ReduceMean over the last axis of a tensor of shape 8 x 1.",
        "Check the axes: another axis is probably meant.",
    ),
    "NF122": Code(
        "eps can be overridden by callers",
        "eps, or another constant that the norm depends on, is an initializer that is also a graph input. Callers may "
        "pass another value at run time, so it is no constant. Example: models exported with "
        "keep_initializers_as_inputs=True.",
        "Remove the initializer from the graph's inputs, or export without keep_initializers_as_inputs.",
    ),
    "NF201": Code(
        "verification failed; left as it was",
        "The norm was recognised and its replacement made, but on test rows the two differed by more than rounding, "
        "so this site was rolled back. The rest of the model is not concerned.",
        "Please report it with the model or the neighbourhood of the node: either the algebra or the check is wrong, "
        "and both would be a bug.",
    ),
    "NF202": Code(
        "the target cannot express it with the same roundings",
        "It is a norm, but the operators of the target have no form with its types and casts, or the one they have is "
        "measurably less exact than the model's own arithmetic. Example: a float32 "
        "weight on bfloat16 data, where the target's operator takes one type for both.",
        "Choose another --target, or let small changes happen with --numerics fast.",
    ),
    "NF203": Code(
        "the target's runtime has no kernel for its type",
        "It is a norm, and the target's operator for it does not run in this type: the runtime would refuse the model, "
        "or take the operator apart again. Example: RMSNormalization in bfloat16 in ONNX Runtime on the CPU.",
        "Use --target normfuse and load its library (docs/onnxruntime.md), which has the type, or convert the model "
        "to float32 or float16.",
    ),
    "NF301": Code(
        "a LayerNorm that is not taken for an RMSNorm",
        "Conversion takes a LayerNorm over one axis, in the main graph or a branch of an If there, whose input is a "
        "value of the graph. Example: a norm over height and width at once, one in the body of a loop, one inside an "
        "operator that adds first or whose mean is read too, or one that is no module of its own, or has hooks or "
        "a state, where an nn.Module is converted.",
        "Nothing, or export the model so that the norm stands by itself.",
    ),
    "NF302": Code(
        "nothing ahead of the norm can take its mean away",
        "For an RMSNorm the mean of the input has to be zero. It is taken away in the weights that make the "
        "input, or by an operator; here neither is possible. Example: a value that is written in place, or, "
        "in an nn.Module, a value that is no module's output.",
        "Convert the exported program or the ONNX model in place of the module: there an operator can stand "
        "anywhere.",
    ),
    "NF303": Code(
        "a conversion that would add as many operators as it converts norms",
        "Where weights cannot take the mean away (an activation, another norm with a weight, a depthwise "
        "convolution), or where somebody else reads the value as it is (a linear layer on the residual "
        "stream, an output of the graph), an operator has to. One that serves a single norm gains nothing. "
        "Example: post-norm models such as BERT, where each norm reads a sum with the output of the norm "
        "before.",
        "Nothing. If a hidden state is an output of the graph that nobody needs, export without it. For a "
        "weight that is shared with the output layer, untie=True makes a copy.",
    ),
    "NF304": Code(
        "a conversion whose certificate failed",
        "The model and its conversion, run in float64 with random weights, have to agree to 1e-12, and a "
        "model has to agree with itself. They did not, or the check could not be run. Nothing was converted.",
        "If the message says that the check could not run, the model needs inputs that NormFuse did not guess: give "
        "--size NAME=N, or --inputs FILE.npz (in Python how=normfuse.bench.How(...)); or it does not say how large the "
        "result of an operator of your own is: add that to its value_info. A difference is a fault of NormFuse: please "
        "report it.",
    ),
    "NF305": Code(
        "a model of which nothing is converted",
        "Editing weights is right only in a graph that is fixed. Example: quantised weights, whose scales "
        "hold for the values as they are; a training graph with dropout; random numbers, such as masks drawn "
        "at run time.",
        "Convert before quantising, and export in evaluation mode.",
    ),
    "NF306": Code(
        "a conversion that gains nothing on the target",
        "The table of the target has measured that an RMSNorm is no faster there than a LayerNorm. Example: ONNX "
        "Runtime before 1.27 on the CPU.",
        "Nothing, or force=True (--force), if the model is meant for more than one runtime.",
    ),
}
