"""Kernels of Moestro's engine, chosen at run time for the processor; see the README of this distribution."""

from ._native import (
    GROUP,
    PAGE,
    Ffn,
    LayerSpec,
    Matrix,
    Model,
    ModelSpec,
    activation,
    choose,
    features,
    linear,
    quantise,
)


__all__ = [
    "GROUP",
    "PAGE",
    "Ffn",
    "LayerSpec",
    "Matrix",
    "Model",
    "ModelSpec",
    "activation",
    "choose",
    "features",
    "linear",
    "quantise",
]
