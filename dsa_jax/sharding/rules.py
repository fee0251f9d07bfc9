"""The sharding rules: what each parameter's dimensions are, and over which mesh axes each kind is sharded.

Two tables. ``PARAMETERS`` gives the logical axes of every parameter and is fixed. ``ShardingRules`` maps logical axes
to mesh axes and is a value: ``RULES`` is the default, and ``use_rules`` puts others in use.
"""

import dataclasses
import itertools
import math
import re
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from dsa_jax.adapted import axes_of_adapter
from dsa_jax.fp8.e4m3 import BLOCK
from dsa_jax.fp8.weight import Fp8Weight

AXES = ("data", "expert", "context", "tensor")
"""The mesh axes, outermost first: neighbouring devices differ in the last one."""
EXPERT_AXIS = "expert"

Axes = tuple[str | None, ...]
"""One logical axis per dimension, None for a dimension that is not sharded; () for an array that is not sharded."""

FSDP = ("fsdp", "fsdp_of_experts")
"""Logical axes that are gathered before a parameter is used."""

# Every parameter; a leading axis of stacked layers is never sharded. "dense_layers" and "moe_layers" also stand for
# "dense_layers_2" and the like (``dsa_jax.layers``).
_FEED_FORWARD: dict[str, Axes] = {"w_gate": ("fsdp", "ff"), "w_up": ("fsdp", "ff"), "w_down": ("ff", "fsdp")}
LAYER: dict[str, Axes] = {
    "attn_norm": (None,),
    "attn.wq_a": ("fsdp", None),
    "attn.q_norm": (None,),
    "attn.wq_b": ("fsdp", "heads"),
    "attn.wkv_a": ("fsdp", None),
    "attn.kv_norm": (None,),
    "attn.wkv_b": ("fsdp", "heads"),
    "attn.wo": ("heads", "fsdp"),
    "attn.indexer.wq_b": ("fsdp", None),
    "attn.indexer.wk": ("fsdp", None),
    "attn.indexer.k_norm.scale": (None,),
    "attn.indexer.k_norm.bias": (None,),
    "attn.indexer.weights_proj": ("fsdp", None),
    "ffn_norm": (None,),
    "ffn.gate": ("fsdp", None),
    "ffn.gate_bias": (None,),
    **{f"ffn.{name}": axes for name, axes in _FEED_FORWARD.items()},
    **{f"ffn.shared_experts.{name}": axes for name, axes in _FEED_FORWARD.items()},
    "ffn.experts.w_gate": ("experts", "fsdp_of_experts", "ff"),
    "ffn.experts.w_up": ("experts", "fsdp_of_experts", "ff"),
    "ffn.experts.w_down": ("experts", "ff", "fsdp_of_experts"),
}
_ENDS: dict[str, Axes] = {"embed": (None, "fsdp"), "norm": (None,), "head": ("fsdp", "vocab")}
PARAMETERS: dict[str, Axes] = {
    **_ENDS,
    **{f"mtp.{name}": axes for name, axes in _ENDS.items()},
    "mtp.embed_norm": (None,),
    "mtp.hidden_norm": (None,),
    "mtp.proj": ("fsdp", None),
    **{f"mtp.layer.{name}": axes for name, axes in LAYER.items()},
    **{f"dense_layers.{name}": (None, *axes) for name, axes in LAYER.items()},
    **{f"moe_layers.{name}": (None, *axes) for name, axes in LAYER.items()},
}

# Logical axes that one operation of the model shards at the same time, so no mesh axis may serve two of them.
_TOGETHER: tuple[Axes, ...] = (
    ("batch", "sequence", "heads"),  # attention
    ("batch", "queries"),  # selection and the index loss
    ("batch", "sequence", "ff"),  # feed-forward layers
    ("batch", "sequence", "vocab"),  # logits
    ("rows", "sequence", "experts", "ff"),  # experts, where all experts' devices see the same rows
    *dict.fromkeys(PARAMETERS.values()),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """For each logical axis the mesh axes that it is sharded over, outermost first; () leaves it whole.

    If the mesh axes do not divide a dimension, the last ones are dropped until the rest do. Rules choose the layout
    and the communication; results stay the same up to summation order.

    Raises:
      ValueError: a name is not one of ``AXES``, one operation would use a mesh axis twice, or ``experts`` is neither
        () nor ("expert",), the one axis along which tokens are dispatched.
    """

    batch: tuple[str, ...] = ("data", "expert")
    # Rows of the batch where all experts' devices see the same ones.
    rows: tuple[str, ...] = ("data",)
    sequence: tuple[str, ...] = ("context",)
    # Of the sequence, where the work is the same for all heads.
    queries: tuple[str, ...] = ("context", "tensor")
    heads: tuple[str, ...] = ("tensor",)
    ff: tuple[str, ...] = ("tensor",)
    vocab: tuple[str, ...] = ("tensor",)
    experts: tuple[str, ...] = (EXPERT_AXIS,)
    # The dimension of a parameter that is gathered before use; of the experts', which ``experts`` shards too.
    fsdp: tuple[str, ...] = ("data", "expert", "context")
    fsdp_of_experts: tuple[str, ...] = ("data", "context")

    def __post_init__(self) -> None:
        for name, axes in dataclasses.asdict(self).items():
            if len(set(axes) & set(AXES)) < len(axes):
                raise ValueError(f"{name} must be different mesh axes of {', '.join(AXES)}, got {axes}")
        if self.experts not in ((), (EXPERT_AXIS,)):
            raise ValueError(f"experts must be () or {(EXPERT_AXIS,)}, got {self.experts}")
        for names in _TOGETHER:
            for one, other in itertools.combinations([name for name in names if name], 2):
                if shared := set(getattr(self, one)) & set(getattr(self, other)):
                    raise ValueError(
                        f"{one} and {other} are sharded at the same time, so they must not share a mesh axis; "
                        f"both have {', '.join(sorted(shared))}"
                    )

    def mesh_axes(self, name: str | None, size: int, mesh: Mesh | AbstractMesh) -> tuple[str, ...] | None:
        """The mesh axes that a dimension of this logical axis and size is sharded over; None if there are none."""
        axes: tuple[str, ...] = getattr(self, name) if name else ()
        while axes and size % math.prod(mesh.shape[axis] for axis in axes):
            axes = axes[:-1]
        return axes or None

    def spec(self, axes: Axes, sizes: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
        """The PartitionSpec of an array with these logical axes and sizes."""
        return P(*(self.mesh_axes(name, size, mesh) for name, size in zip(axes, sizes, strict=True)))


RULES = ShardingRules()

_IN_USE = jax.make_user_context(default_value=RULES)


def use_rules(rules: ShardingRules) -> AbstractContextManager[None]:
    """``with use_rules(rules):`` puts rules in use, for the model and for the functions that place arrays.

    The rules belong to the key of ``jax.jit``'s caches: a function that was traced under other rules is traced again.
    """
    return _IN_USE(rules)


def rules_in_use() -> ShardingRules:
    """The rules of the innermost ``use_rules``; ``RULES`` outside of any."""
    return _IN_USE.value


def axes_of_parameter(path: str, shape: tuple[int, ...]) -> Axes:
    """The logical axes of the parameter (or LoRA factor) whose dotted tree path ends ``path``.

    Raises:
      ValueError: ``PARAMETERS`` does not list it, or lists it with another number of dimensions.
    """
    found = re.search(r"(?:^|\.)(params|lora)\.(?!.*\b(?:params|lora)\.)(.+)$", path)
    name, adapter = (found[2], found[1] == "lora") if found else (path, False)
    if adapter:
        name, factor = name.rsplit(".", 1)
    axes = PARAMETERS.get(re.sub(r"^(dense_layers|moe_layers)_\d+\.", r"\1.", name))
    if axes is None:
        raise ValueError(f"parameter {path} {shape} has no row in dsa_jax.sharding.rules.PARAMETERS; add one")
    if adapter:
        axes = axes_of_adapter(axes)["ab".index(factor)]
    if len(axes) != len(shape):
        raise ValueError(f"parameter {path} must have {len(axes)} axes, {axes}, got {shape}")
    return axes


def dotted(path: tuple[Any, ...]) -> str:
    """A path of ``jax.tree`` functions as "params.moe_layers.attn.wo"."""
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def divisible_sizes(leaf: Any) -> tuple[int, ...]:
    """Per dimension, into how many parts an array can be cut: its elements, or the whole blocks of an FP8 weight."""
    if not isinstance(leaf, Fp8Weight):
        return leaf.shape
    return *leaf.shape[:-2], *(n // BLOCK if n % BLOCK == 0 else 1 for n in leaf.shape[-2:])
