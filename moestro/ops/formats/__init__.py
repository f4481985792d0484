"""Packed matrices: small codes in groups along the input, scales beside them. The bytes are in docs/formats.md."""

from moestro.ops.formats._base import (
    Format,
    Packing,
    Params,
    Parts,
    check_packing,
    format_named,
    formats,
    packing,
    spread_groups,
)
from moestro.ops.formats._bits import pack_rows, row_bytes, unpack_rows
from moestro.ops.formats._matrix import dequantise, nearest, packed_linear, packed_nbytes, quantise


__all__ = [
    "Format",
    "Packing",
    "Params",
    "Parts",
    "check_packing",
    "dequantise",
    "format_named",
    "formats",
    "nearest",
    "pack_rows",
    "packed_linear",
    "packed_nbytes",
    "packing",
    "quantise",
    "row_bytes",
    "spread_groups",
    "unpack_rows",
]
