"""The compiled operators (csrc/host/cuda), each called with one request whose tensors the kernels can read."""

from __future__ import annotations

import torch

from ...contract import namespaces
from ...contract.requests import BeginChunk, ReDMD, Rotate, StreamingAttention, Write
from ...contract.schemas import flattener
from .requests import AttentionBackward, AttentionForward

Tensor = torch.Tensor
native, private = namespaces.native, namespaces.cuda
_flat_begin_chunk, _flat_write, _flat_rotate = flattener(BeginChunk), flattener(Write), flattener(Rotate)
_flat_streaming, _flat_loss = flattener(StreamingAttention), flattener(ReDMD)
_flat_forward, _flat_backward = flattener(AttentionForward), flattener(AttentionBackward)


def begin_chunk(request: BeginChunk) -> None:
    native.begin_chunk(*_flat_begin_chunk(request))


def write(request: Write) -> None:
    native.write(*_flat_write(request))


def rotate(request: Rotate) -> Tensor:
    return native.rotate(*_flat_rotate(request))


def streaming_attention(request: StreamingAttention) -> tuple[Tensor, Tensor]:
    return native.streaming_attention(*_flat_streaming(request))


def redmd_loss(request: ReDMD) -> tuple[Tensor, Tensor]:
    return native.redmd_loss(*_flat_loss(request))


def attention_forward(request: AttentionForward) -> tuple[Tensor, Tensor]:
    return private.attention_forward(*_flat_forward(request))


def attention_backward(request: AttentionBackward) -> tuple[Tensor, Tensor, Tensor]:
    return private.attention_backward(*_flat_backward(request))
