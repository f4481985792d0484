"""The stacked weights of a set of feed-forward experts."""

from dataclasses import dataclass

from torch import Tensor

from moestro.core.errors import ConfigError


@dataclass(frozen=True)
class FFNWeights:
    """y = down(activation(up(x))) for E experts, in Transformers' stacked layout.

    up_EJD: [E, J, D]; gated experts have J = 2I with the gate's rows first, the others J = I. `interleaved`: gate and
    up rows alternate instead, as in gpt-oss checkpoints. Transposed views are as fast as contiguous tensors.
    down_EOI: [E, O, I]. up_bias_EJ, down_bias_EO: [E, J] and [E, O], or None. All of one floating dtype.
    Raises ConfigError when shapes or dtypes do not fit together.
    """

    up_EJD: Tensor
    down_EOI: Tensor
    gated: bool = True
    up_bias_EJ: Tensor | None = None
    down_bias_EO: Tensor | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.up_EJD.dim() != 3 or self.down_EOI.dim() != 3:
            raise ConfigError(
                "expert weights must be [experts, out, in]; "
                f"got {tuple(self.up_EJD.shape)} and {tuple(self.down_EOI.shape)}"
            )
        num_experts, rows, _ = self.up_EJD.shape
        _, out, inner = self.down_EOI.shape
        wanted = {
            "down": (self.down_EOI, (num_experts, out, rows // 2 if self.gated else rows)),
            "up bias": (self.up_bias_EJ, (num_experts, rows)),
            "down bias": (self.down_bias_EO, (num_experts, out)),
        }
        for name, (tensor, shape) in wanted.items():
            if tensor is None:
                continue
            if tensor.dtype != self.up_EJD.dtype:
                raise ConfigError(
                    f"{name} projection is {tensor.dtype}, the up projection {self.up_EJD.dtype}; cast one"
                )
            if tuple(tensor.shape) != shape:
                raise ConfigError(
                    f"{name} projection is {tuple(tensor.shape)}; an up projection of "
                    f"{tuple(self.up_EJD.shape)} (gated: {self.gated}) needs {shape}"
                )
        if self.gated and rows != 2 * inner:
            raise ConfigError(f"gated experts need an even number of up rows; got {rows}")

    @property
    def num_experts(self) -> int:
        """E."""
        return self.up_EJD.shape[0]

    @property
    def out_dim(self) -> int:
        """O."""
        return self.down_EOI.shape[1]

    @property
    def macs_per_row(self) -> int:
        """Multiply-adds of one row through one expert."""
        return self.up_EJD[0].numel() + self.down_EOI[0].numel() if self.num_experts else 0
