"""The 2-bit layout of ternary codes. The C++ side states the same in its contract, ternary_tile_matmul.hpp.

code  0 -> 00    +1 -> 01    -1 -> 10    (11 is reserved and an error when read)

Four columns a byte, lowest bits first: column 4p + i stands at bits 2i and 2i + 1 of byte p. A row is padded with 00 to whole
bytes, so a row of K columns takes ceil(K / 4) bytes and rows are independent of each other.
"""

import torch
from torch import Tensor

CODES_PER_BYTE = 4
RESERVED_CODE = 0b11


def packed_width(num_columns: int) -> int:
    """Bytes of a packed row: ceil(num_columns / 4)."""
    return -(-num_columns // CODES_PER_BYTE)


def pack_ternary(codes: Tensor) -> Tensor:
    """Pack values of {-1, 0, +1}, any dtype, [..., K] into uint8 [..., ceil(K / 4)].

    Raises:
        ValueError: a value outside {-1, 0, +1} (NaN included), or a scalar.
    """
    if codes.dim() == 0:
        raise ValueError("codes must have at least one dimension, got a scalar")
    is_ternary = (codes == 0) | (codes == 1) | (codes == -1)
    if not bool(is_ternary.all()):
        bad = codes[~is_ternary].flatten()[0].item()
        raise ValueError(f"codes must be in {{-1, 0, 1}}, got {bad}")
    bits = torch.where(codes == -1, 2, codes.to(torch.int64)).to(torch.int32)
    num_columns = codes.shape[-1]
    bits = torch.nn.functional.pad(bits, (0, packed_width(num_columns) * CODES_PER_BYTE - num_columns))
    fields = bits.reshape(*bits.shape[:-1], packed_width(num_columns), CODES_PER_BYTE)
    shifts = torch.arange(0, 2 * CODES_PER_BYTE, 2, device=codes.device, dtype=torch.int32)
    return (fields << shifts).sum(-1).to(torch.uint8)


def unpack_ternary(packed: Tensor, num_columns: int) -> Tensor:
    """Unpack uint8 [..., ceil(K / 4)] into int8 [..., K] in {-1, 0, +1}; reserved fields read as 0 (see :func:`check_packed`).

    Raises:
        ValueError: the packed width is not ceil(num_columns / 4).
    """
    if packed.shape[-1] != packed_width(num_columns):
        raise ValueError(
            f"packed width ({packed.shape[-1]}) must be ceil(num_columns / 4) ({packed_width(num_columns)}) "
            f"for num_columns = {num_columns}"
        )
    shifts = torch.arange(0, 2 * CODES_PER_BYTE, 2, device=packed.device, dtype=torch.int32)
    # Functions, as the ONNX exporter knows them and not the operator >>.
    fields = torch.bitwise_right_shift(packed.to(torch.int32).unsqueeze(-1), shifts) & RESERVED_CODE
    codes = (fields & 1) - torch.bitwise_right_shift(fields, 1)
    return codes.flatten(-2)[..., :num_columns].to(torch.int8)


def check_packed(packed: Tensor, num_columns: int) -> None:
    """Verify a packed tensor that comes from outside (a file).

    Raises:
        ValueError: wrong dtype or width, a reserved field 11, or padding bits that are not 0.
    """
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed codes must be torch.uint8, got {packed.dtype}")
    # Equality after a round trip covers both faults: 11 reads as 0 and padding is cut off.
    if not torch.equal(pack_ternary(unpack_ternary(packed, num_columns)), packed):
        raise ValueError("packed codes hold the reserved field 11 or padding bits that are not 0")
