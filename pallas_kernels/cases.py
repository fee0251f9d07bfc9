"""Named shapes of DeepSeek-V3.2, shared by the benchmark and the tests of kernels."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement: an operation at a shape. Letters as in ``pallas_kernels``."""

    operation: str
    name: str
    B: int = 1
    T: int
    S: int
    dtype: str
    mask: str = "full"  # full: every query sees all S keys; causal: query t of T sees (t + 1) * S / T of them
    I: int = 64
    J: int = 128
    K: int = 2048
    N: int = 128
    C: int = 512
    R: int = 64

    @property
    def tiny(self) -> "Case":
        """The same case at a size that a CPU does in a moment."""
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
        )

    @property
    def visible_keys(self) -> int:
        """Keys that one query sees, on average."""
        return self.S if self.mask == "full" else (self.S + self.S // self.T) // 2

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products (2 per multiply-add); 0 for select_topk."""
        queries = self.B * self.T
        return {
            "index_scores": 2 * queries * self.visible_keys * self.I * self.J,
            "select_topk": 0,
            "sparse_mla": 2 * queries * min(self.K, self.S) * self.N * (2 * self.C + self.R),
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


def _attention(T: int, S: int) -> Case:
    return Case(operation="sparse_mla", name=f"{T} of {S // 1024}K keys", T=T, S=S, dtype="bfloat16")


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
    _attention(4096, 8 * K),
    _attention(4096, 32 * K),
    _attention(4096, 128 * K),
)
