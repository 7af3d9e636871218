"""One instruction at a time against known answers."""

import math

import pytest
import torch
from ptx.handwritten import run

I32 = torch.int32


def u32(*values):
    return torch.tensor([v - (1 << 32) if v >= 1 << 31 else v for v in values], dtype=I32)


def as_u32(tensor):
    return [int(v) & 0xFFFFFFFF for v in tensor]


INTEGER = [
    ("add.s32 %o0, %i0, %i1;", [5, -7], [3, 2], [8, -5]),
    ("add.sat.s32 %o0, %i0, %i1;", [2**31 - 1], [5], [2**31 - 1]),
    ("sub.u32 %o0, %i0, %i1;", [3], [5], [-2]),
    ("mul.lo.s32 %o0, %i0, %i1;", [100000], [100000], [1410065408]),
    ("mul.hi.s32 %o0, %i0, %i1;", [-1, 1 << 30], [5, 4], [-1, 1]),
    ("mul.hi.u32 %o0, %i0, %i1;", [-1], [2], [1]),
    ("mul24.lo.s32 %o0, %i0, %i1;", [0x1000003], [5], [15]),
    ("mad.lo.s32 %o0, %i0, %i1, 7;", [3, -3], [4, 4], [19, -5]),
    ("mad.hi.u32 %o0, %i0, %i1, 7;", [-1], [2], [8]),
    ("div.s32 %o0, %i0, %i1;", [7, -7, -7], [2, 2, -2], [3, -3, 3]),
    ("div.u32 %o0, %i0, %i1;", [-1], [2], [2**31 - 1]),
    ("rem.s32 %o0, %i0, %i1;", [7, -7], [3, 3], [1, -1]),
    ("min.s32 %o0, %i0, %i1;", [-1, 4], [1, 3], [-1, 3]),
    ("min.u32 %o0, %i0, %i1;", [-1], [1], [1]),
    ("max.s32 %o0, %i0, %i1;", [-1], [1], [1]),
    ("sad.s32 %o0, %i0, %i1, 10;", [3, -3], [5, 5], [12, 18]),
    ("and.b32 %o0, %i0, %i1;", [12], [10], [8]),
    ("or.b32 %o0, %i0, %i1;", [12], [10], [14]),
    ("xor.b32 %o0, %i0, %i1;", [12], [10], [6]),
    ("shl.b32 %o0, %i0, %i1;", [1, 1, 1], [4, 31, 32], [16, -(2**31), 0]),
    ("shr.u32 %o0, %i0, %i1;", [-1, -1], [28, 40], [15, 0]),
    ("shr.s32 %o0, %i0, %i1;", [-8, -8], [1, 40], [-4, -1]),
    ("bfe.u32 %o0, %i0, %i1, 4;", [0x12345678, -1], [8, 30], [6, 3]),
    ("bfe.s32 %o0, %i0, %i1, 4;", [0xF00, 0x700], [8, 8], [-1, 7]),
    ("bfi.b32 %o0, %i0, %i1, 8, 4;", [0xAB], [0x12345678], [0x12345B78]),
    ("prmt.b32 %o0, %i0, %i1, 0x5410;", [0x44332211], [0x77665544], [0x55442211]),
    ("prmt.b32 %o0, %i0, %i1, 0x888B;", [0x00000080], [0], [-256]),
    ("lop3.b32 %o0, %i0, %i1, 0x0f, 0x96;", [0x33], [0x55], [0x33 ^ 0x55 ^ 0x0F]),
    ("dp4a.s32.u32 %o0, %i0, %i1, 100;", [0x01FF0203], [0x02030405], [100 + 2 - 3 + 8 + 15]),
    ("shf.l.wrap.b32 %o0, %i0, %i1, 8;", [-(2**31)], [1], [0x180]),
    ("shf.r.clamp.b32 %o0, %i0, %i1, 4;", [0x10], [0xF], [-0xFFFFFFF]),
]


@pytest.mark.parametrize(("lines", "a", "b", "want"), INTEGER, ids=[case[0].split()[0] for case in INTEGER])
def test_integer(ptx, lines, a, b, want):
    assert run(ptx, lines, a, b).tolist() == want


def test_one_operand(ptx):
    for lines, a, want in [
        ("neg.s32 %o0, %i0;", [5], [-5]),
        ("abs.s32 %o0, %i0;", [-5, 5], [5, 5]),
        ("not.b32 %o0, %i0;", [0], [-1]),
        ("cnot.b32 %o0, %i0;", [0, 3], [1, 0]),
        ("popc.b32 %o0, %i0;", [-1, 6], [32, 2]),
        ("clz.b32 %o0, %i0;", [0, 1, -1], [32, 31, 0]),
        ("bfind.u32 %o0, %i0;", [0, 1, 0x80], [-1, 0, 7]),
        ("bfind.shiftamt.s32 %o0, %i0;", [0x80], [24]),
        ("brev.b32 %o0, %i0;", [1], [-(2**31)]),
    ]:
        assert run(ptx, lines, a).tolist() == want, lines


def test_wide_and_64_bits(ptx):
    assert run(ptx, "mul.wide.s32 %o0, %i0, %i1;", [-3], [1 << 30], out=torch.int64).tolist() == [-3 << 30]
    assert run(ptx, "mad.wide.u32 %o0, %i0, %i1, 5;", [-1], [2], out=torch.int64).tolist() == [(2**32 - 1) * 2 + 5]
    a, b = torch.tensor([1 << 40, -5]), torch.tensor([1 << 30, 3])
    assert run(ptx, "mul.hi.s64 %o0, %i0, %i1;", a, b, out=torch.int64).tolist() == [1 << 6, -1]
    assert run(ptx, "div.s64 %o0, %i0, %i1;", a, b, out=torch.int64).tolist() == [1 << 10, -1]
    assert run(ptx, "bfi.b64 %o0, %i0, %i1, 4, 60;", b, a, out=torch.int64)[0] == 1 << 34


def test_carry(ptx):
    lines = "add.cc.u32 %o0, %i0, %i1; addc.u32 %o1, 0, 0;"
    low, high = run(ptx, lines, [-1, 1], [1, 1], out=[I32, I32])
    assert low.tolist() == [0, 2] and high.tolist() == [1, 0]
    lines = "sub.cc.u32 %o0, %i0, %i1; subc.u32 %o1, 5, 0;"
    low, high = run(ptx, lines, [0, 3], [1, 1], out=[I32, I32])
    assert low.tolist() == [-1, 2] and high.tolist() == [4, 5]


def test_mov_packs_and_unpacks(ptx):
    assert run(ptx, "mov.b64 %o0, {%i0, %i1};", [1], [2], out=torch.int64).tolist() == [2 << 32 | 1]
    lines = "mov.b32 {%h0, %h1}, %i0; mov.b32 %o0, {%h1, %h0};"
    assert run(ptx, lines, [0x00010002]).tolist() == [0x00020001]


def test_scopes_hide_names(ptx):
    lines = "{ .reg .b32 %i0; mov.b32 %i0, 5; bra L; mov.b32 %i0, 6; L: mov.b32 %o0, %i0; } { bra L; L: }"
    assert run(ptx, lines, [1]).tolist() == [5]


def test_float_rounding_modes(ptx):
    x, y = torch.tensor([1.0, -1.0]), torch.tensor([2.0**-30, -(2.0**-30)])
    up, down = 1 + 2.0**-23, 1.0
    assert run(ptx, "add.rn.f32 %o0, %i0, %i1;", x, y, out=torch.float32).tolist() == [1.0, -1.0]
    assert run(ptx, "add.rp.f32 %o0, %i0, %i1;", x, y, out=torch.float32).tolist() == [up, -down]
    assert run(ptx, "add.rm.f32 %o0, %i0, %i1;", x, y, out=torch.float32).tolist() == [down, -up]
    assert run(ptx, "add.rz.f32 %o0, %i0, %i1;", x, y, out=torch.float32).tolist() == [1.0, -1.0]


def test_fma_rounds_once(ptx):
    a = torch.tensor([1 + 2.0**-12])
    want = float(a.double() ** 2 - 1)
    assert run(ptx, "fma.rn.f32 %o0, %i0, %i0, 0fBF800000;", a, out=torch.float32).item() == want
    separate = run(ptx, "mul.rn.f32 %o0, %i0, %i0; add.rn.f32 %o0, %o0, 0fBF800000;", a, out=torch.float32)
    assert separate.item() != want


def test_float_special_values(ptx):
    nan, inf = math.nan, math.inf
    a, b = torch.tensor([nan, 1.0, -0.0, inf]), torch.tensor([2.0, nan, 0.0, 1.0])
    assert run(ptx, "max.f32 %o0, %i0, %i1;", a, b, out=torch.float32).tolist() == [2.0, 1.0, 0.0, inf]
    assert run(ptx, "min.f32 %o0, %i0, %i1;", a, b, out=torch.float32)[2].signbit()
    assert run(ptx, "max.NaN.f32 %o0, %i0, %i1;", a, b, out=torch.float32)[:2].isnan().all()
    small = torch.tensor([1e-40])
    assert run(ptx, "mul.f32 %o0, %i0, 0f3F800000;", small, out=torch.float32) == small
    assert run(ptx, "mul.ftz.f32 %o0, %i0, 0f3F800000;", small, out=torch.float32) == 0
    assert run(ptx, "add.sat.f32 %o0, %i0, %i0;", torch.tensor([3.0, -1.0, 0.25]), out=torch.float32).tolist() == [
        1,
        0,
        0.5,
    ]


def test_blackwell_pairs_and_three_operands(ptx):
    x = torch.tensor([1.0, 2.0, 3.0, -4.0]).view(torch.int64)
    fused = run(ptx, "fma.rn.f32x2 %o0, %i0, %i0, %i0;", x, out=torch.int64)
    assert fused.view(torch.float32).tolist() == [2.0, 6.0, 12.0, 12.0]
    difference = run(ptx, "sub.f32x2 %o0, %i0, %i1;", x, x.flip(0), out=torch.int64)
    assert difference.view(torch.float32).tolist() == [-2.0, 6.0, 2.0, -6.0]
    a, b, c = torch.tensor([1.0, 5.0]), torch.tensor([2.0, 4.0]), torch.tensor([3.0, math.nan])
    assert run(ptx, "max.f32 %o0, %i0, %i1, %i2;", a, b, c, out=torch.float32).tolist() == [3.0, 5.0]


@pytest.mark.parametrize(
    ("opcode", "function"),
    [("ex2.approx.f32", torch.exp2), ("lg2.approx.f32", torch.log2), ("rcp.approx.f32", torch.reciprocal),
     ("sqrt.approx.f32", torch.sqrt), ("rsqrt.approx.f32", torch.rsqrt), ("sin.approx.f32", torch.sin),
     ("cos.approx.f32", torch.cos), ("tanh.approx.f32", torch.tanh), ("sqrt.rn.f32", torch.sqrt)],
)  # fmt: skip
def test_special_functions(ptx, opcode, function):
    x = torch.linspace(0.1, 5, 32)
    torch.testing.assert_close(run(ptx, f"{opcode} %o0, %i0;", x, out=torch.float32), function(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("suffix", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_arithmetic_rounds_once(ptx, suffix, dtype):
    torch.manual_seed(1)
    a, b, c = (torch.randn(256).to(dtype) for _ in range(3))
    for opcode, want in [
        ("add", a.double() + b.double()),
        ("mul", a.double() * b.double()),
        ("sub", a.double() - b.double()),
    ]:
        lines = f"{opcode}.{suffix} %o0, %i0, %i1;"
        assert torch.equal(run(ptx, lines, a, b, out=dtype), want.to(torch.float32).to(dtype)), opcode
    fused = run(ptx, f"fma.rn.{suffix} %o0, %i0, %i1, %i2;", a, b, c, out=dtype)
    exact = a.double() * b.double() + c.double()
    assert ((fused.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-7).all()


def test_fma_of_halves_does_not_round_twice(ptx):
    a, b = torch.tensor([1 + 2.0**-10] * 2).half(), torch.tensor([2.0**-11] * 2).half()
    c = torch.tensor([1.0, 1.0 + 2.0**-10]).half()
    # a * b = 2^-11 + 2^-21: just above half a unit of c, so it must round up, by however little.
    assert run(ptx, "fma.rn.f16 %o0, %i0, %i1, %i2;", a, b, c, out=torch.float16).tolist() == [
        1 + 2.0**-10,
        1 + 2.0**-9,
    ]


def test_packed_halves(ptx):
    pair = torch.tensor([1.5, -2.0], dtype=torch.float16).view(I32)
    assert run(ptx, "add.f16x2 %o0, %i0, %i0;", pair).view(torch.float16).tolist() == [3.0, -4.0]
    pair = torch.tensor([1.5, -2.0], dtype=torch.bfloat16).view(I32)
    assert run(ptx, "max.bf16x2 %o0, %i0, 0;", pair).view(torch.bfloat16).tolist() == [1.5, 0.0]
    assert run(ptx, "fma.rn.relu.bf16x2 %o0, %i0, %i0, %i0;", pair).view(torch.bfloat16).tolist() == [3.75, 2.0]


def test_convert_integers_and_floats(ptx):
    x = torch.tensor([2.5, -2.5, 3.7, 1e20, math.nan])
    assert run(ptx, "cvt.rni.s32.f32 %o0, %i0;", x).tolist() == [2, -2, 4, 2**31 - 1, 0]
    assert run(ptx, "cvt.rzi.s32.f32 %o0, %i0;", x).tolist()[:3] == [2, -2, 3]
    assert run(ptx, "cvt.rmi.s32.f32 %o0, %i0;", x).tolist()[:3] == [2, -3, 3]
    assert run(ptx, "cvt.rzi.u32.f32 %o0, %i0;", x).tolist()[:2] == [2, 0]
    assert run(ptx, "cvt.rpi.f32.f32 %o0, %i0;", x, out=torch.float32).tolist()[:3] == [3.0, -2.0, 4.0]
    assert run(ptx, "cvt.rn.f32.s32 %o0, %i0;", [16777217], out=torch.float32).tolist() == [16777216.0]
    assert run(ptx, "cvt.rp.f32.s32 %o0, %i0;", [16777217], out=torch.float32).tolist() == [16777218.0]
    assert run(ptx, "cvt.s64.s32 %o0, %i0;", [-1], out=torch.int64).tolist() == [-1]
    assert run(ptx, "cvt.u64.u32 %o0, %i0;", [-1], out=torch.int64).tolist() == [2**32 - 1]
    assert run(ptx, "cvt.s32.s8 %o0, %i0;", [0x180]).tolist() == [-128]
    assert run(ptx, "cvt.sat.s8.s32 %o0, %i0;", [300, -300]).tolist() == [127, 128]  # as bits
    assert run(ptx, "cvt.sat.f32.f32 %o0, %i0;", x, out=torch.float32).tolist() == [1, 0, 1, 1, 0]
    assert run(ptx, "cvt.rn.f32.f64 %o0, %i0;", torch.tensor([0.1], dtype=torch.float64), out=torch.float32).item() == (
        torch.tensor(0.1).item()
    )


def test_convert_halves_like_torch(ptx):
    torch.manual_seed(2)
    x = torch.cat(
        [
            torch.randn(500) * torch.logspace(-9, 6, 500),
            torch.tensor([math.inf, -math.inf, 0.0, -0.0, 65519.9, 65520.0]),
        ]
    )
    for suffix, dtype in [("f16", torch.float16), ("bf16", torch.bfloat16)]:
        assert torch.equal(run(ptx, f"cvt.rn.{suffix}.f32 %o0, %i0;", x, out=dtype), x.to(dtype))
        assert torch.equal(run(ptx, f"cvt.f32.{suffix} %o0, %i0;", x.to(dtype), out=torch.float32), x.to(dtype).float())
    down = run(ptx, "cvt.rz.f16.f32 %o0, %i0;", x[:500], out=torch.float16)
    assert (down.float().abs() <= x[:500].abs()).all()


def test_convert_pairs_put_the_first_source_in_the_upper_half(ptx):
    x, y = torch.tensor([1.0]), torch.tensor([2.0])
    pair = run(ptx, "cvt.rn.bf16x2.f32 %o0, %i0, %i1;", x, y)
    assert pair.view(torch.bfloat16).tolist() == [2.0, 1.0]
    pair = run(ptx, "cvt.rn.f16x2.f32 %o0, %i0, %i1;", x, y)
    assert pair.view(torch.float16).tolist() == [2.0, 1.0]


def test_convert_eight_bits_like_torch(ptx):
    x = torch.linspace(-500, 500, 101)
    for suffix, dtype in [("e4m3x2", torch.float8_e4m3fn), ("e5m2x2", torch.float8_e5m2)]:
        lines = f".reg .b16 %x; cvt.rn.satfinite.{suffix}.f32 %x, 0f00000000, %i0; cvt.u32.u16 %o0, %x;"
        got = run(ptx, lines, x).to(torch.uint8).view(dtype)
        limit = torch.finfo(dtype).max
        assert torch.equal(got.float(), x.clamp(-limit, limit).to(dtype).float())


def test_convert_tf32(ptx):
    x = torch.tensor([1 + 2.0**-11, 1 + 2.0**-11 + 2.0**-20, -1 - 2.0**-11])
    away = run(ptx, "cvt.rna.tf32.f32 %o0, %i0;", x, out=torch.float32)
    assert away.tolist() == [1 + 2.0**-10, 1 + 2.0**-10, -1 - 2.0**-10]


def test_compare_and_select(ptx):
    a, b = torch.tensor([1.0, math.nan, 2.0]), torch.tensor([2.0, 1.0, 2.0])
    for comparison, want in [
        ("lt", [1, 0, 0]),
        ("ltu", [1, 1, 0]),
        ("eq", [0, 0, 1]),
        ("neu", [1, 1, 0]),
        ("num", [1, 0, 1]),
    ]:
        assert run(ptx, f"setp.{comparison}.f32 %p1, %i0, %i1; selp.b32 %o0, 1, 0, %p1;", a, b).tolist() == want
    lines = """setp.gt.s32 %p1, %i0, 0; setp.lt.and.s32 %p2|%p3, %i0, %i1, %p1;
    selp.b32 %o0, 1, 0, %p2; selp.b32 %o1, 1, 0, %p3;"""
    p, q = run(ptx, lines, [1, -1, 5], [2, 2, 2], out=[I32, I32])
    assert p.tolist() == [1, 0, 0] and q.tolist() == [0, 0, 1]
    assert run(ptx, "setp.lo.u32 %p1, %i0, %i1; selp.b32 %o0, 1, 0, %p1;", [-1], [1]).tolist() == [0]
    assert run(ptx, "set.lt.u32.s32 %o0, %i0, %i1;", [-1, 3], [1, 1]).tolist() == [-1, 0]
    assert run(ptx, "slct.b32.s32 %o0, 7, 8, %i0;", [-1, 3]).tolist() == [8, 7]
    assert run(ptx, "testp.notanumber.f32 %p1, %i0; selp.b32 %o0, 1, 0, %p1;", a).tolist() == [0, 1, 0]


def test_unknown_instruction_is_named_with_its_line(ptx):
    with pytest.raises(ptx.PTXError, match=r"unknown instruction 'frobnicate\.b32'") as caught:
        run(ptx, "\nfrobnicate.b32 %o0, %i0;", [1])
    assert caught.value.kind == "unsupported" and caught.value.line > 0
    with pytest.raises(ptx.PTXError, match=r"add\.rn\.f128"):
        run(ptx, "add.rn.f128 %o0, %i0, %i0;", [1])
