"""Small PTX programs for the tests: one block whose threads load inputs, run a few lines, and store results."""

import torch

HEADER = ".version 8.8\n.target {target}\n.address_size 64\n"
WIDTHS = {torch.int16: "b16", torch.int32: "b32", torch.int64: "b64", torch.float32: "b32", torch.float64: "b64",
          torch.float16: "b16", torch.bfloat16: "b16", torch.uint8: "b8"}  # fmt: skip
LETTERS = {"b8": "h", "b16": "h", "b32": "r", "b64": "d"}


def program(
    body: str, parameters: str = ".param .u64 out", target: str = "sm_80", outside: str = "", directives: str = ""
) -> str:
    """An entry ``test`` with registers %r, %h (16 bits), %d (64 bits), %f, %p and %tid.x in %r0."""
    return f"""{HEADER.format(target=target)}{outside}
.visible .entry test({parameters}) {directives}
{{
  .reg .pred %p<16>; .reg .b16 %h<64>; .reg .b32 %r<128>; .reg .b64 %d<64>; .reg .f32 %f<32>;
  mov.u32 %r0, %tid.x;
{body}
  ret;
}}
"""


def elementwise(lines: str, inputs: list, out_dtypes: list) -> str:
    """Thread i loads element i of each input to %i0, %i1, ..., and stores %o0, %o1, ..."""
    parameters = ", ".join(f".param .u64 p{k}" for k in range(len(inputs) + len(out_dtypes)))
    body, declared = [], []
    for k, tensor in enumerate(inputs):
        width = WIDTHS[tensor.dtype]
        declared.append(f".reg .{'b16' if width == 'b8' else width} %i{k};")
        body.append(f"ld.param.u64 %d0, [p{k}]; mul.wide.u32 %d1, %r0, {tensor.element_size()};")
        body.append(f"add.u64 %d0, %d0, %d1; ld.global.{width} %i{k}, [%d0];")
    body.append(lines)
    for k, dtype in enumerate(out_dtypes):
        width = WIDTHS[dtype]
        declared.append(f".reg .{width} %o{k};")
        body.append(f"ld.param.u64 %d0, [p{len(inputs) + k}]; mul.wide.u32 %d1, %r0, {dtype.itemsize};")
        body.append(f"add.u64 %d0, %d0, %d1; st.global.{width} [%d0], %o{k};")
    return program("\n".join(declared + body), parameters)


def run(ptx, lines: str, *inputs, out=torch.int32):
    """Results of ``lines`` applied to each row of the inputs."""
    tensors = [x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.int32) for x in inputs]
    dtypes = out if isinstance(out, (list, tuple)) else [out]
    outs = [torch.empty(len(tensors[0]), dtype=dtype) for dtype in dtypes]
    args = {f"p{k}": tensor for k, tensor in enumerate([*tensors, *outs])}
    poison = [f"p{len(tensors) + k}" for k in range(len(outs))]
    module = ptx.Module(elementwise(lines, tensors, dtypes))
    module.launch("test", (1,), (len(tensors[0]),), args, poison=poison)
    return outs if isinstance(out, (list, tuple)) else outs[0]
