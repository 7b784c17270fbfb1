"""Parts that transformer models share: attention, and checks of their sizes."""

from dataclasses import dataclass
from typing import Literal

from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from meshpipe.errors import ArgumentError, check_whole
from meshpipe.mesh import DATA
from meshpipe.models.attention import NAMES, AttentionName, attend, choose_attention, kernel_of, stands_in, why_not
from meshpipe.models.cache import KeyValueCache
from meshpipe.models.initializers import EMBED, HEADS, kernel_init, zeros_init
from meshpipe.models.model import ModelConfig
from meshpipe.models.norms import NormConfig, rms_norm
from meshpipe.models.rope import RopeScaling, rotate
from meshpipe.models.splash import LANES


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(ModelConfig):
    """What the configurations of all transformers have."""

    d_model: int
    """Number of features of every position between the layers."""
    num_heads: int
    """Number of attention heads per block; d_model must be a multiple of twice this."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of computation; bfloat16 is for accelerators. Parameters are float32, whatever this is."""
    attention: AttentionName = "auto"
    """How attention is computed: `xla` writes the scores of all pairs of positions to memory; fused kernels do not:
    `cudnn` for bfloat16 on NVIDIA GPUs, `pallas` on TPUs. `auto` takes the kernel of the devices where dtype and sizes
    allow it."""

    def notes(self, mesh: Mesh) -> list[str]:
        head_dim, softcap = self.features_of_a_head, self.caps_scores
        return attention_notes(self.attention, self.dtype, head_dim, mesh, softcap=softcap)

    @property
    def features_of_a_head(self) -> int:
        return self.d_model // self.num_heads

    @property
    def caps_scores(self) -> bool:
        """Whether attention scores are kept within a range."""
        return False


def _into_heads(
    d_model: int, heads: int, head_dim: int, use_bias: bool, dtype: str, rngs: nnx.Rngs
) -> nnx.LinearGeneral:
    """A projection of every position's features to those of its heads."""
    return nnx.LinearGeneral(
        d_model,
        (heads, head_dim),
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=kernel_init(EMBED, HEADS, None),
        bias_init=zeros_init(HEADS, None),
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Attention to the same or another sequence; heads share key and value heads in equal groups (arXiv 2305.13245).

    Heads are an array axis of their own, so that tensor parallelism can only ever split whole heads.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        causal: bool,
        rope_theta: float | None,
        rope_scaling: RopeScaling | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        head_norm: NormConfig | None = None,
        window: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        out_scale: float = 1.0,
        implementation: AttentionName = "auto",
        dtype: str,
        rngs: nnx.Rngs,
    ) -> None:
        self.causal = causal
        self.implementation = implementation
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.window = window
        self.softcap = softcap
        self.scale = scale
        self.dtype = dtype
        self.cache: KeyValueCache | None = None
        """What it keeps of the positions so far, in generation; see `open_cache`."""
        head_dim = d_model // num_heads if head_dim is None else head_dim

        def project(heads: int) -> nnx.LinearGeneral:
            return _into_heads(d_model, heads, head_dim, qkv_bias, dtype, rngs)

        self.query = project(num_heads)
        self.key = project(num_kv_heads)
        self.value = project(num_kv_heads)
        self.out = nnx.LinearGeneral(
            (num_heads, head_dim),
            d_model,
            axis=(-2, -1),
            use_bias=out_bias,
            dtype=dtype,
            kernel_init=kernel_init(HEADS, None, EMBED, scale=out_scale),
            bias_init=zeros_init(EMBED),
            rngs=rngs,
        )

        def norm() -> nnx.Module | None:
            return None if head_norm is None else rms_norm(head_dim, None, head_norm, dtype=dtype, rngs=rngs)

        self.query_norm, self.key_norm = norm(), norm()

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        segment_ids: Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        memory: Float[Array, "batch seq2 embed"] | None = None,
    ) -> Float[Array, "batch seq embed"]:
        """Position i attends to position j of `memory`, or of `x` itself, where their `segment_ids` are equal, and only
        to j <= i if causal. `positions` are those that RoPE marks, by default 0 to seq - 1. Without a `rope_theta`,
        positions are not marked: they must be part of `x`.
        """
        attended_to = x if memory is None else memory
        query, key, value = self.query(x), self.key(attended_to), self.value(attended_to)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rope_theta is not None:
            query = rotate(query, self.rope_theta, positions, self.rope_scaling)
            key = rotate(key, self.rope_theta, positions, self.rope_scaling)
        if self.cache is not None and positions is not None:
            self.cache.write(key, value, positions)
            if x.shape[1] == 1:
                return self.out(self._attend_to_cache(query, self.cache, positions))
        attended = attend(
            query,
            key,
            value,
            causal=self.causal,
            segment_ids=segment_ids,
            window=self.window,
            softcap=self.softcap,
            scale=self.scale,
            implementation=self.implementation,
        )
        return self.out(attended)

    def open_cache(self, batch: int, length: int) -> None:
        """From now on it keeps the keys and values of `batch` texts of up to `length` positions.

        A call with `positions` [batch, seq] then either begins every text, from position 0 on, or continues it: one
        position of every text (seq 1) attends to all that was kept.
        """
        *_, heads, head_dim = self.key.kernel.shape
        slots = length if self.window is None else min(length, self.window)
        cache = KeyValueCache((batch, slots, heads, head_dim), (DATA, None, HEADS, None), self.dtype)
        self.cache = nnx.data(cache)  # until now it was None, which Flax takes for an attribute without variables

    def _attend_to_cache(
        self,
        query: Float[Array, "batch 1 heads head_dim"],
        cache: KeyValueCache,
        positions: Int[Array, "batch 1"],
    ) -> Float[Array, "batch 1 heads head_dim"]:
        return attend(
            query,
            cache.keys[...],
            cache.values[...],
            causal=False,
            mask=cache.mask(positions, self.window),
            softcap=self.softcap,
            scale=self.scale,
            implementation="xla",  # fused kernels gain nothing for a single query
        )


def attention_notes(asked: AttentionName, dtype: str, head_dim: int, mesh: Mesh, *, softcap: bool = False) -> list[str]:
    """What computes attention on the devices of a mesh, in a sentence. Raises `ValueError` if they cannot."""
    device = mesh.devices.flat[0]
    chosen = choose_attention(asked, dtype=dtype, head_dim=head_dim, device=device, softcap=softcap)
    if stands_in(device) and asked in ("cudnn", "pallas"):
        return [f"Attention: {NAMES[asked]} is asked for; this plan is laid out on CPU devices and counts XLA's."]
    if asked != "auto":
        return [f"Attention by {NAMES[chosen]}."]
    kernel = kernel_of(device)
    if kernel is None:
        found = "this plan is laid out on CPU" if stands_in(device) else f"these are {device.platform}"
        reason = f": fused kernels are for NVIDIA GPUs and TPUs, and {found} devices"
    elif chosen == "xla":
        reason = f": {why_not(kernel, dtype=dtype, head_dim=head_dim, softcap=softcap, device=device)}"
    else:
        reason = f"; of fewer than {LANES} positions by XLA" if chosen == "pallas" else ""
    return [f"Attention by {NAMES[chosen]}{reason}."]


def check_heads(
    d_model: int, num_heads: int, num_kv_heads: int, head_dim: int | None = None, *, rotary: bool = True
) -> None:
    """Raises `ValueError` when the sizes do not give whole heads, in equal groups; rotary positions need an even number
    of features of a head.
    """
    unit = (2 if rotary else 1) * num_heads
    if head_dim is None and d_model % unit:
        rule = "2 * `num_heads`: rotary positions turn pairs of features" if rotary else "`num_heads`"
        raise ArgumentError(
            f"`d_model` must be a multiple of {rule}. Got {d_model} with {num_heads} heads. "
            f"The next multiple is {-(-d_model // unit) * unit}.",
            "model",
        )
    if head_dim is not None:
        check_whole("head_dim", head_dim, section="model")
        if head_dim % 2:
            raise ArgumentError(
                f"`head_dim` must be even: rotary positions turn pairs of features. Got {head_dim}.", "model"
            )
    if num_heads % num_kv_heads:
        raise ArgumentError(
            "`num_heads` must be a multiple of `num_kv_heads`, which equal groups of heads share. "
            f"Got {num_heads} and {num_kv_heads}.",
            "model",
        )


def check_at_least_one(**sizes: int) -> None:
    for name, size in sizes.items():
        check_whole(name, size, section="model")
