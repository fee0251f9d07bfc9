"""Named shapes of DeepSeek-V3.2, shared by the benchmark and the tests of kernels."""

import dataclasses
from collections import Counter
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement: an operation at a shape.

    Letters as in ``pallas_kernels``. A grouped product has T rows of width D = d_model and E experts of width F.
    """

    operation: str
    name: str
    B: int = 1
    T: int
    S: int
    dtype: str  # of the index queries and keys, for sparse_mla of the cached latents, for grouped_matmul of weights
    mask: str = "full"  # full: every query sees all S keys; causal: query t of T sees (t + 1) * S / T of them
    I: int = 64
    J: int = 128
    K: int = 2048
    N: int = 128
    C: int = 512
    R: int = 64
    P: int = 128
    H: int = 128
    E: int = 256
    D: int = 7168
    F: int = 2048

    @property
    def tiny(self) -> "Case":
        """The same case at a size that takes a CPU a moment."""
        return dataclasses.replace(
            self,
            B=min(self.B, 2),
            T=min(self.T, 8),
            S=64,
            K=16,
            I=8,
            N=8,
            C=min(self.C, 128),
            R=min(self.R, 32),
            E=min(self.E, 4),
            D=min(self.D, 192),
            F=min(self.F, 160),
        )

    @property
    def visible_keys(self) -> int:
        """Keys that one query sees, on average."""
        return self.S if self.mask == "full" else (self.S + self.S // self.T) // 2

    @property
    def chosen_keys(self) -> float:
        """Keys that one query attends to, on average."""
        if self.mask == "full" or self.K >= self.S:
            return float(min(self.K, self.visible_keys))
        return self.K - self.K * self.K / (2 * self.S)

    @property
    def work(self) -> Mapping[str, float]:
        """The least that the operation needs, by the ceiling that limits it.

        Under a dtype: floating-point operations of matrix products in it, 2 per multiply-add. Under "copy": the
        bytes of the scores that select_topk reads.
        """
        queries = self.B * self.T
        scores = Counter({self.dtype: 2.0 * queries * self.visible_keys * self.I * self.J})
        topk = Counter({"copy": 4.0 * queries * self.visible_keys})
        mqa = Counter({"bfloat16": 2.0 * queries * self.chosen_keys * self.N * (2 * self.C + self.R)})
        mha = Counter({"bfloat16": 2.0 * queries * self.visible_keys * self.N * (self.P + self.R + self.H)})
        grouped = Counter({"bfloat16": 2.0 * queries * self.D * self.F})
        return {
            "grouped_matmul": grouped,
            "index_scores": scores,
            "select_topk": topk,
            "sparse_mla": mqa,
            "dsa_attention": scores + topk + mqa,
            "dsa_attention_mha": scores + topk + mha,
            "dense_attention": mha,
        }[self.operation]


def _scores(T: int, S: int, dtype: str, **kwargs) -> Case:
    short = {"float8_e4m3fn": "fp8", "bfloat16": "bf16"}[dtype]
    mask = kwargs.get("mask", "full")
    name = f"{short} {T} x {S // 1024}K" + ("" if mask == "full" else f" {mask}")
    return Case(operation="index_scores", name=name, T=T, S=S, dtype=dtype, **kwargs)


def _topk(T: int, S: int, **kwargs) -> Case:
    mask = kwargs.get("mask", "full")
    name = f"{T} rows of {S // 1024}K" + ("" if mask == "full" else f" {mask}")
    return Case(operation="select_topk", name=name, T=T, S=S, dtype="float32", **kwargs)


def _prefill(S: int) -> Case:
    return Case(operation="sparse_mla", name=f"4096 of {S // 1024}K keys", T=4096, S=S, dtype="bfloat16")


def _decode(B: int, dtype: str) -> Case:
    short = {"float8_e4m3fn": "fp8", "bfloat16": "bf16"}[dtype]
    return Case(operation="sparse_mla", name=f"decode {B} x 8K, {short} cache", B=B, T=1, S=8192, dtype=dtype)


def _layer(operation: str, S: int) -> Case:
    return Case(
        operation=operation, name=f"{S // 1024}K, causal", T=S, S=S, dtype="float8_e4m3fn", mask="causal"
    )


def _grouped(T: int, E: int, dtype: str) -> Case:
    short = {"float8_e4m3fn": "fp8", "bfloat16": "bf16"}[dtype]
    return Case(operation="grouped_matmul", name=f"{T} rows, {E} {short} experts", T=T, S=0, E=E, dtype=dtype)


K = 1024
CASES = (
    _scores(4096, 32 * K, "float8_e4m3fn"),
    _scores(4096, 32 * K, "float8_e4m3fn", mask="causal"),
    _scores(4096, 8 * K, "float8_e4m3fn"),
    _scores(2048, 128 * K, "float8_e4m3fn"),
    _scores(4096, 32 * K, "bfloat16"),
    _scores(4096, 32 * K, "bfloat16", mask="causal"),
    _topk(4096, 8 * K),
    _topk(4096, 32 * K),
    _topk(4096, 128 * K),
    _topk(4096, 128 * K, mask="causal"),
    _topk(1, 128 * K),
    _topk(32, 128 * K),
    *(_prefill(S * K) for S in (8, 32, 128)),
    *(_decode(B, dtype) for dtype in ("bfloat16", "float8_e4m3fn") for B in (1, 32, 128)),
    *(_grouped(T, E, "bfloat16") for T, E in ((32 * K, 256), (4 * K, 32), (256, 256))),
    *(_grouped(T, 256, "float8_e4m3fn") for T in (32 * K, 256)),
    *(_layer("dsa_attention", S * K) for S in (2, 4, 8, 16, 32, 128)),
    *(_layer("dsa_attention_mha", S * K) for S in (2, 4, 8, 16)),
    *(_layer("dense_attention", S * K) for S in (8, 32, 128)),
)
