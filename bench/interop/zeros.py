"""Quantise one half-empty matrix in every format that libraries offer, and say which zeros come out as zeros.

    python zeros.py WEIGHTS.npy

WEIGHTS is a float32 matrix `[out in]` with exact zeros. Prints JSON: by format its library and version, the share of zeros that
are still zero, the share of other weights that became zero, and the error over the size of the weights. Runs in the
environment of zeros.txt.
"""

# ruff: noqa: PLC0415 (any of the libraries may be missing)

import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

Made = tuple[str, str, Callable[[np.ndarray], Any]]
"""Format, library, and what gives the weights back that come out of it."""
PLAIN = ("F32", "F16", "BF16", "I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K")


def ggml() -> Iterator[Made]:
    """Yield every type of GGML that stores weights."""
    import libgguf

    for kind in libgguf.GGMLQuantizationType:
        if kind.name not in PLAIN:
            yield (
                kind.name,
                "libgguf",
                lambda w, kind=kind: libgguf.dequantize_rows(
                    libgguf.quantize_rows(w, kind), kind, n_per_row=w.shape[1]
                ),
            )


def bits_and_bytes() -> Iterator[Made]:
    """Yield NF4, FP4 and the two 8-bit forms."""
    from bitsandbytes import functional

    def four(kind: str) -> Callable[[np.ndarray], Any]:
        def through(w: np.ndarray) -> Any:
            codes, state = functional.quantize_4bit(torch.tensor(w), quant_type=kind)
            return functional.dequantize_4bit(codes, state)

        return through

    def rows(w: np.ndarray) -> Any:
        codes, scale, _ = functional.int8_vectorwise_quant(torch.tensor(w).half())
        return codes.float() * scale[:, None] / 127

    def blocks(w: np.ndarray) -> Any:
        codes, state = functional.quantize_blockwise(torch.tensor(w))
        return functional.dequantize_blockwise(codes, state)

    yield "nf4", "bitsandbytes", four("nf4")
    yield "fp4", "bitsandbytes", four("fp4")
    yield "int8 by row (LLM.int8)", "bitsandbytes", rows
    yield "8-bit by block", "bitsandbytes", blocks


def hqq() -> Iterator[Made]:
    """Yield HQQ by bits."""
    from hqq.core.quantize import Quantizer

    for bits in (8, 4, 3, 2):

        def through(w: np.ndarray, bits: int = bits) -> Any:
            codes, how = Quantizer.quantize(torch.tensor(w), nbits=bits, group_size=64, device="cpu")
            return Quantizer.dequantize(codes, how)

        yield f"HQQ {bits} bits", "hqq", through


def quanto() -> Iterator[Made]:
    """Yield quanto's types of 8 bits; it compiles what unpacks the others."""
    from optimum.quanto import AbsmaxOptimizer, qfloat8, qint8, quantize_weight

    def through(w: np.ndarray, kind: Any) -> Any:
        weight = torch.tensor(w)
        scale = AbsmaxOptimizer()(weight, kind, axis=0)
        return quantize_weight(weight, kind, axis=0, scale=scale).dequantize()

    for kind in (qint8, qfloat8):
        yield f"quanto {kind.name}", "optimum-quanto", lambda w, kind=kind: through(w, kind)


def onnx() -> Iterator[Made]:
    """Yield MatMulNBits: what the graph gives for unit vectors."""
    import onnx as own
    import onnxruntime
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    def through(w: np.ndarray, bits: int, symmetric: bool) -> Any:
        helper = own.helper
        x, y = (
            helper.make_tensor_value_info(name, own.TensorProto.FLOAT, [None, n])
            for name, n in (("x", w.shape[1]), ("y", w.shape[0]))
        )
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        graph = helper.make_graph(
            [node], "g", [x], [y], [own.numpy_helper.from_array(np.ascontiguousarray(w.T), "w")]
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        quantiser = MatMulNBitsQuantizer(
            model, bits=bits, block_size=32, is_symmetric=symmetric, accuracy_level=0
        )
        quantiser.process()
        session = onnxruntime.InferenceSession(quantiser.model.model.SerializeToString())
        return session.run(["y"], {"x": np.eye(w.shape[1], dtype=np.float32)})[0].T

    for bits in (4, 8):
        for symmetric in (True, False):
            how = "symmetric" if symmetric else "with zero points"
            yield (
                f"MatMulNBits {bits} bits, {how}",
                "onnxruntime",
                lambda w, bits=bits, symmetric=symmetric: through(w, bits, symmetric),
            )


def mlx() -> Iterator[Made]:
    """Yield MLX's affine form by bits, and its floating forms."""
    import mlx.core as mx

    def through(w: np.ndarray, **how: Any) -> Any:
        return np.array(mx.dequantize(*mx.quantize(mx.array(w), **how), **how, dtype=mx.float32))

    for bits in (2, 3, 4, 5, 6, 8):
        yield (
            f"MLX affine {bits} bits",
            "mlx",
            lambda w, bits=bits: through(w, bits=bits, group_size=64, mode="affine"),
        )
    for mode in ("mxfp4", "mxfp8", "nvfp4"):
        yield f"MLX {mode}", "mlx", lambda w, mode=mode: through(w, mode=mode)


def torchao() -> Iterator[Made]:
    """Yield torchao's weight-only forms that run on a CPU."""
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerGroup,
        quantize_,
    )

    def through(w: np.ndarray, config: Any) -> Any:
        linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
        linear.weight.data = torch.tensor(w)
        quantize_(linear, config)
        return linear.weight.dequantize()

    forms: dict[str, Callable[[], Any]] = {"float8": Float8WeightOnlyConfig, "int8": Int8WeightOnlyConfig}
    for bits in (4, 3, 2):
        for name in ("SYMMETRIC", "ASYMMETRIC"):
            forms[f"int{bits} {name.lower()}"] = lambda bits=bits, name=name: IntxWeightOnlyConfig(
                weight_dtype=getattr(torch, f"int{bits}"),
                granularity=PerGroup(64),
                mapping_type=getattr(MappingType, name),
            )
    for name, config in forms.items():
        yield f"torchao {name}", "torchao", lambda w, config=config: through(w, config())


def main(file: str) -> None:
    """Print what every format makes of the matrix; what a library refuses is said."""
    weights = np.load(file)
    zero, found = weights == 0, dict[str, Any]()
    for library in (ggml, bits_and_bytes, hqq, quanto, onnx, mlx, torchao):
        try:
            for name, package, through in library():
                row: dict[str, Any] = {"library": f"{package} {version(package)}"}
                try:
                    after = np.asarray(through(weights.copy()), dtype=np.float32)
                    row |= {
                        "zeros_kept": float((after[zero] == 0).mean()),
                        "others_lost": float((after[~zero] == 0).mean()),
                        "error": float(np.square(after - weights).sum() / np.square(weights).sum()) ** 0.5,
                    }
                except Exception as error:
                    row["refused"] = f"{type(error).__name__}: {error}"[:200]
                found[name] = row
        except ImportError as error:
            found[library.__name__] = {"library": library.__name__, "refused": str(error)[:200]}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
