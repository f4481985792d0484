"""Kernels of Moestro's engine, chosen at run time for the processor; see the README of this distribution."""

from ._native import (
    GROUP,
    PAGE,
    Bank,
    Ffn,
    LayerSpec,
    Matrix,
    Model,
    ModelSpec,
    Route,
    activation,
    choose,
    features,
    linear,
    quantise,
    train_features,
)


__all__ = [
    "GROUP",
    "PAGE",
    "Bank",
    "Ffn",
    "LayerSpec",
    "Matrix",
    "Model",
    "ModelSpec",
    "Route",
    "activation",
    "choose",
    "features",
    "linear",
    "quantise",
    "train_features",
]
