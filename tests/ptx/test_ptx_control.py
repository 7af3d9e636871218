"""Branches, warp-wide instructions, memory instructions and atomics against known answers."""

import pytest
import torch
from ptx.handwritten import program, run

LANES = torch.arange(32, dtype=torch.int32)


def launch(
    ptx, body, *tensors, block=32, grid=1, shared=0, seed=0, poison=(), outside="", target="sm_80", directives="",
    **options,
):  # fmt: skip
    parameters = ", ".join(f".param .u64 p{k}" for k in range(len(tensors)))
    loads = "\n".join(f"ld.param.u64 %d{40 + k}, [p{k}];" for k in range(len(tensors)))
    module = ptx.Module(program(loads + body, parameters, target, outside, directives))
    args = {f"p{k}": tensor for k, tensor in enumerate(tensors)}
    return module.launch("test", (grid,), (block,), args, shared, seed, poison=poison, **options)


def test_divergent_loop_with_a_trip_count_per_lane(ptx):
    lines = """mov.u32 %r1, 0; mov.u32 %r2, 0;
    loop: setp.gt.s32 %p1, %r2, %i0; @%p1 bra done; add.s32 %r1, %r1, %r2; add.s32 %r2, %r2, 1; bra loop;
    done: mov.u32 %o0, %r1;"""
    assert run(ptx, lines, LANES).tolist() == [n * (n + 1) // 2 for n in range(32)]


def test_lanes_reconverge_before_a_shuffle(ptx):
    lines = """setp.lt.s32 %p1, %i0, 10; @%p1 bra less; mov.u32 %r1, 100; bra join; less: mov.u32 %r1, 200;
    join: shfl.sync.idx.b32 %o0, %r1, 0, 31, -1;"""
    assert run(ptx, lines, LANES).tolist() == [200] * 32


def test_a_spinning_lane_does_not_starve_the_lane_it_waits_for(ptx):
    flag = torch.zeros(1, dtype=torch.int32)
    body = """setp.ne.s32 %p1, %r0, 5; @%p1 bra wait; bra set;
    wait: ld.volatile.global.u32 %r1, [%d40]; setp.eq.s32 %p2, %r1, 0; @%p2 bra wait; ret;
    set: st.volatile.global.u32 [%d40], 1;"""
    launch(ptx, body, flag, step_limit=10_000_000)
    assert flag.item() == 1


def test_endless_loop_is_reported(ptx):
    with pytest.raises(ptx.PTXError) as caught:
        launch(ptx, "again: bra again;", torch.zeros(1), step_limit=1000)
    assert caught.value.kind == "step-limit"


@pytest.mark.parametrize(
    ("mode", "clamp", "want"),
    [("bfly", 31, [lane ^ 3 for lane in range(32)]), 
     ("down", 31, [lane + 3 if lane < 29 else lane for lane in range(32)]),
     ("up", 0, [lane - 3 if lane >= 3 else lane for lane in range(32)]), ("idx", 31, [3] * 32),
     ("down", 0x181F, [lane + 3 if lane % 8 < 5 else lane for lane in range(32)]),
     ("idx", 0x181F, [lane // 8 * 8 + 3 for lane in range(32)])],
)  # fmt: skip
def test_shuffle(ptx, mode, clamp, want):
    lines = f"shfl.sync.{mode}.b32 %o0|%p1, %i0, 3, {clamp}, -1; selp.b32 %o1, 1, 0, %p1;"
    values, in_range = run(ptx, lines, LANES, out=[torch.int32, torch.int32])
    assert values.tolist() == want
    assert in_range.tolist() == [int(mode in ("bfly", "idx") or v != lane) for lane, v in enumerate(want)]


def test_votes_and_reductions(ptx):
    lines = "setp.lt.s32 %p1, %i0, 3; vote.sync.{} {}, %p1, -1;"
    assert run(ptx, lines.format("ballot.b32", "%o0"), LANES).tolist() == [7] * 32
    for mode, want in [("all", 0), ("any", 1), ("uni", 0)]:
        text = lines.format(f"{mode}.pred", "%p2") + "selp.b32 %o0, 1, 0, %p2;"
        assert run(ptx, text, LANES).tolist() == [want] * 32
    assert run(ptx, "redux.sync.add.s32 %o0, %i0, -1;", LANES).tolist() == [496] * 32
    assert run(ptx, "redux.sync.max.u32 %o0, %i0, -1;", LANES).tolist() == [31] * 32
    lines = "shr.u32 %r1, %i0, 3; match.any.sync.b32 %o0, %r1, -1;"
    assert run(ptx, lines, LANES)[8].item() == 0xFF00
    assert run(ptx, "activemask.b32 %o0;", LANES).tolist() == [-1] * 32
    lines = "elect.sync %r1|%p1, -1; selp.b32 %o0, 1, 0, %p1;"
    assert run(ptx, lines, LANES).tolist() == [1] + [0] * 31


def test_halves_of_a_warp_shuffle_apart(ptx):
    lines = (
        "setp.lt.s32 %p1, %i0, 16; selp.b32 %r1, 0x0000ffff, 0xffff0000, %p1; shfl.sync.bfly.b32 %o0, %i0, 1, 31, %r1;"
    )
    assert run(ptx, lines, LANES).tolist() == [lane ^ 1 for lane in range(32)]


def test_special_registers(ptx):
    out = torch.empty(2 * 64, dtype=torch.int32)
    body = """mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mad.lo.u32 %r3, %r1, %r2, %r0; mov.u32 %r4, %laneid;
    mov.u32 %r5, %warpid; mad.lo.u32 %r6, %r5, 100, %r4; mov.u32 %r7, %nctaid.x; mad.lo.u32 %r6, %r7, 1000, %r6;
    mul.wide.u32 %d1, %r3, 4; add.u64 %d1, %d1, %d40; st.global.u32 [%d1], %r6;"""
    launch(ptx, body, out, block=64, grid=2)
    assert out.tolist() == [2000 + t // 32 * 100 + t % 32 for t in range(64)] * 2


def test_loads_and_stores_of_all_widths(ptx):
    data = torch.arange(-64, 64, dtype=torch.int8)
    out = torch.zeros(8, dtype=torch.int64)
    body = """setp.ne.s32 %p1, %r0, 0; @%p1 ret;
    ld.global.s8 %r1, [%d40+1]; cvt.s64.s32 %d1, %r1; st.global.b64 [%d41], %d1;
    ld.global.u8 %r1, [%d40+1]; cvt.u64.u32 %d1, %r1; st.global.b64 [%d41+8], %d1;
    ld.global.s16 %r1, [%d40+2]; cvt.s64.s32 %d1, %r1; st.global.b64 [%d41+16], %d1;
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d40+16]; st.global.v2.b32 [%d41+24], {%r1, %r4};
    ld.global.v2.b64 {%d1, %d2}, [%d40+32]; st.global.v2.b64 [%d41+32], {%d2, %d1};
    ld.const.b32 %r1, [table+4]; cvt.u64.u32 %d1, %r1; st.global.b64 [%d41+48], %d1;"""
    launch(ptx, body, data, out, outside=".const .align 4 .b32 table[3] = {5, 6, 7};")
    raw = data.view(torch.int64)
    words = data.view(torch.int32)
    both = torch.tensor([words[4], words[7]], dtype=torch.int32).view(torch.int64)
    half = data.view(torch.int16)[1]
    assert out.tolist()[:7] == [-63, 193, half, both, raw[5], raw[4], 6]


def test_generic_and_local_addresses(ptx):
    out = torch.empty(32, dtype=torch.int32)
    body = """.local .align 8 .b8 depot[16]; .shared .align 4 .b8 buffer[128];
    mov.u64 %d1, depot; cvta.local.u64 %d1, %d1; st.u32 [%d1+4], %r0; ld.local.u32 %r1, [depot+4];
    mov.u64 %d2, buffer; cvta.shared.u64 %d2, %d2; mul.wide.u32 %d3, %r0, 4; add.u64 %d2, %d2, %d3; st.u32 [%d2], %r1;
    cvta.to.shared.u64 %d4, %d2; ld.shared.u32 %r2, [%d4];
    cvta.to.global.u64 %d5, %d40; add.u64 %d5, %d5, %d3; st.u32 [%d5], %r2;"""
    launch(ptx, body, out, poison=["p0"])
    assert out.tolist() == list(range(32))


ATOMICS = [("add.u32", 7, 10), ("min.s32", -3, -3), ("max.s32", 5, 5), ("and.b32", 1, 1), ("or.b32", 8, 11),
           ("xor.b32", 1, 2),
           ("exch.b32", 9, 9), ("inc.u32", 3, 0), ("inc.u32", 9, 4), ("dec.u32", 9, 2)]  # fmt: skip


@pytest.mark.parametrize(("operation", "operand", "want"), ATOMICS)
def test_atomics(ptx, operation, operand, want):
    cell = torch.tensor([3], dtype=torch.int32)
    old = torch.empty(1, dtype=torch.int32)
    body = (
        f"setp.ne.s32 %p1, %r0, 0; @%p1 ret; atom.global.{operation} %r1, [%d40], {operand}; st.global.u32 [%d41], %r1;"
    )
    launch(ptx, body, cell, old)
    assert (old.item(), cell.item()) == (3, want)


def test_atomics_of_many_threads(ptx):
    total, cell = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    body = """red.global.add.f32 [%d40], 0f3F000000; atom.global.cas.b32 %r1, [%d41], %r0, 77;
    .shared .align 4 .b32 counter; setp.eq.s32 %p1, %r0, 0; @%p1 st.shared.u32 [counter], 0; bar.sync 0;
    atom.shared.add.u32 %r2, [counter], 1; bar.sync 0; ld.shared.u32 %r3, [counter]; setp.ne.u32 %p2, %r3, 64;
    @%p2 trap;"""
    launch(ptx, body, total, cell, block=64, grid=3)
    assert total.item() == 96 and cell.item() == 77


def test_named_barriers_and_arrive(ptx):
    """Warps 0 and 1 produce and only arrive; warps 2 and 3 wait for them."""
    out = torch.empty(64, dtype=torch.int32)
    body = """.shared .align 4 .b32 buffer[64]; mov.u32 %r9, buffer;
    setp.ge.u32 %p1, %r0, 64; @%p1 bra consume;
    shl.b32 %r1, %r0, 2; add.u32 %r1, %r1, %r9; st.shared.u32 [%r1], %r0; bar.arrive 1, 128; ret;
    consume: bar.sync 1, 128; sub.u32 %r2, 127, %r0; shl.b32 %r3, %r2, 2; add.u32 %r3, %r3, %r9;
    ld.shared.u32 %r4, [%r3];
    sub.u32 %r5, %r0, 64; mul.wide.u32 %d1, %r5, 4; add.u64 %d1, %d1, %d40; st.global.u32 [%d1], %r4;"""
    for seed in range(5):
        launch(ptx, body, out, block=128, seed=seed, poison=["p0"])
        assert out.tolist() == list(range(63, -1, -1))


def test_exited_threads_do_not_hold_a_barrier(ptx):
    body = "setp.ge.u32 %p1, %r0, 40; @%p1 ret; bar.sync 0; red.global.add.u32 [%d40], 1;"
    count = torch.zeros(1, dtype=torch.int32)
    launch(ptx, body, count, block=96)
    assert count.item() == 40


def test_barrier_reductions(ptx):
    count = torch.zeros(1, dtype=torch.int32)
    body = """setp.lt.u32 %p1, %r0, 5; bar.red.popc.u32 %r1, 0, %p1; bar.red.and.pred %p2, 0, %p1;
    bar.red.or.pred %p3, 0, %p1;
    @%p2 trap; @!%p3 trap; setp.ne.u32 %p4, %r1, 5; @%p4 trap;"""
    launch(ptx, body, count, block=64)


def test_mbarrier_hands_data_over(ptx):
    out = torch.empty(32, dtype=torch.int32)
    body = """.shared .align 8 .b64 ready; .shared .align 4 .b32 buffer[32]; mov.u32 %r9, buffer;
    and.b32 %r8, %r0, 31;
    setp.eq.u32 %p1, %r0, 0; @%p1 mbarrier.init.shared::cta.b64 [ready], 32; bar.sync 0; shl.b32 %r1, %r8, 2;
    add.u32 %r1, %r1, %r9;
    setp.ge.u32 %p2, %r0, 32; @%p2 bra wait; st.shared.u32 [%r1], %r0; mbarrier.arrive.shared::cta.b64 %d1, [ready];
    ret;
    wait: mbarrier.try_wait.parity.shared::cta.b64 %p3, [ready], 0; @!%p3 bra wait;
    xor.b32 %r1, %r1, 4; ld.shared.u32 %r2, [%r1]; mul.wide.u32 %d2, %r8, 4; add.u64 %d2, %d2, %d40;
    st.global.u32 [%d2], %r2;"""
    for seed in range(5):
        launch(ptx, body, out, block=64, seed=seed, poison=["p0"], target="sm_90")
        assert out.tolist() == [lane ^ 1 for lane in range(32)]


def test_mbarrier_waits_for_copies(ptx):
    """Warp 0 copies and goes on; the arrivals come with the copies, of every thread, counted or not (.noinc)."""
    source, out = torch.arange(128, dtype=torch.int32), torch.empty(32, dtype=torch.int32)
    body = """.shared .align 8 .b64 ready; .shared .align 16 .b8 buffer[512]; mov.u32 %r9, buffer;
    setp.eq.u32 %p1, %r0, 0; @%p1 mbarrier.init.shared::cta.b64 [ready], {count}; bar.sync 0;
    setp.ge.u32 %p2, %r0, 32; @%p2 bra wait; shl.b32 %r1, %r0, 4; cvt.u64.u32 %d1, %r1; add.u64 %d1, %d1, %d40;
    add.u32 %r1, %r1, %r9; cp.async.cg.shared.global [%r1], [%d1], 16;
    cp.async.mbarrier.arrive{noinc}.shared::cta.b64 [ready]; {more} ret;
    wait: mbarrier.try_wait.parity.shared::cta.b64 %p3, [ready], 0; @!%p3 bra wait;
    and.b32 %r8, %r0, 31; mul.wide.u32 %d2, %r8, 4; shl.b32 %r1, %r8, 2; add.u32 %r1, %r1, %r9;
    ld.shared.u32 %r2, [%r1]; add.u64 %d2, %d2, %d41; st.global.u32 [%d2], %r2;"""
    forms = [
        {"count": 32, "noinc": ".noinc", "more": ""},
        {"count": 1, "noinc": "", "more": "bar.warp.sync -1; @%p1 mbarrier.arrive.shared::cta.b64 _, [ready];"},
    ]
    for form in forms:
        for seed in range(3):
            launch(ptx, body.format(**form), source, out, block=64, seed=seed, poison=["p1"], target="sm_90")
            assert out.tolist() == list(range(32))


def test_registers_change_hands(ptx):
    """168 registers a thread at the launch of 384: what one warpgroup releases, two take."""
    body = """setp.lt.u32 %p1, %r0, 128; @%p1 bra release; setmaxnreg.inc.sync.aligned.u32 232; bra done;
    release: setmaxnreg.dec.sync.aligned.u32 40; done: bar.sync 0;"""
    for seed in range(3):
        launch(ptx, body, block=384, seed=seed, target="sm_90a", directives=".maxntid 384")


def test_cp_async_fills_with_zeros(ptx):
    source, out = torch.arange(8, dtype=torch.int32), torch.empty(8, dtype=torch.int32)
    body = """.shared .align 16 .b8 buffer[32]; setp.ne.u32 %p1, %r0, 0; @%p1 ret; mov.u32 %r1, buffer;
    mov.u32 %r2, 8;
    cp.async.cg.shared.global [%r1], [%d40], 16, %r2; cp.async.ca.shared.global [%r1+16], [%d40+16], 16;
    cp.async.wait_all; ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r1]; st.global.v4.b32 [%d41], {%r3, %r4, %r5, %r6};
    ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r1+16]; st.global.v4.b32 [%d41+16], {%r3, %r4, %r5, %r6};"""
    launch(ptx, body, source, out, poison=["p1"])
    assert out.tolist() == [0, 1, 0, 0, 4, 5, 6, 7]


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_ldmatrix_and_stmatrix(ptx, trans):
    """Through registers and back: the matrices, transposed where one of the two transposes."""
    source, out = torch.arange(256, dtype=torch.int16), torch.empty(256, dtype=torch.int16)
    body = f""".shared .align 16 .b8 buffer[512]; mov.u32 %r9, buffer; shl.b32 %r1, %r0, 4; cvt.u64.u32 %d1, %r1;
    add.u64 %d2, %d40, %d1;
    add.u32 %r2, %r9, %r1; ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%d2];
    st.shared.v4.b32 [%r2], {{%r3, %r4, %r5, %r6}}; bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r3, %r4, %r5, %r6}}, [%r2]; bar.warp.sync -1;
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r2], {{%r3, %r4, %r5, %r6}}; bar.warp.sync -1;
    ld.shared.v4.b32 {{%r3, %r4, %r5, %r6}}, [%r2]; add.u64 %d3, %d41, %d1;
    st.global.v4.b32 [%d3], {{%r3, %r4, %r5, %r6}};"""
    launch(ptx, body, source, out, poison=["p1"], target="sm_90")
    matrices = source.view(4, 8, 8)
    assert torch.equal(out.view(4, 8, 8), matrices.transpose(1, 2) if trans else matrices)


def mma(ptx, shape, types, a, b, element_bits):
    """One mma.sync with fragments loaded element by element as the PTX manual lays them out."""
    rows, depth = a.shape
    per = 32 // element_bits
    lane = torch.arange(32)
    raw = {32: torch.int32, 16: torch.int16, 8: torch.uint8}[element_bits]

    def registers(matrix, row, column):  # [32, n, per] indices
        return matrix.view(raw)[row, column].reshape(32, -1).contiguous().view(torch.int32)

    g, t, e = (lane // 4)[:, None, None], (lane % 4)[:, None, None], torch.arange(per)[None, None, :]
    r = torch.arange(rows * depth // 32 // per)[None, :, None]
    left = registers(a, g + 8 * (r & 1) + 0 * e, per * t + 4 * per * (r >> 1) + e)
    r = torch.arange(8 * depth // 32 // per)[None, :, None]
    right = registers(b, per * t + 4 * per * r + e, g + 0 * r + 0 * e)
    columns = [*left.T.contiguous(), *right.T.contiguous()]
    names = [f"%i{k}" for k in range(len(columns))]
    left_names, right_names = ", ".join(names[: left.shape[1]]), ", ".join(names[left.shape[1] :])
    zero = "0f00000000" if types.startswith("f32") else "0"
    fragments = f"{{%o0, %o1, %o2, %o3}}, {{{left_names}}}, {{{right_names}}}, {{{zero}, {zero}, {zero}, {zero}}}"
    lines = f"mma.sync.aligned.{shape}.row.col.{types} {fragments};"
    dtype = torch.float32 if types.startswith("f32") else torch.int32
    outs = torch.stack(run(ptx, lines, *columns, out=[dtype] * 4))  # [4, 32]
    result = torch.empty(16, 8, dtype=dtype)
    for k in range(4):
        result[lane // 4 + 8 * (k >> 1), lane % 4 * 2 + (k & 1)] = outs[k]
    return result


MMA = [("m16n8k16", "f32.f16.f16.f32", torch.float16), ("m16n8k16", "f32.bf16.bf16.f32", torch.bfloat16),
       ("m16n8k8", "f32.f16.f16.f32", torch.float16), ("m16n8k8", "f32.tf32.tf32.f32", torch.float32),
       ("m16n8k4", "f32.tf32.tf32.f32", torch.float32), 
       ("m16n8k32", "f32.e4m3.e4m3.f32", torch.float8_e4m3fn)]  # fmt: skip


@pytest.mark.parametrize(("shape", "types", "dtype"), MMA, ids=[f"{c[0]}-{c[1]}" for c in MMA])
def test_mma(ptx, shape, types, dtype):
    depth = int(shape.split("k")[1])
    torch.manual_seed(0)
    # Small integers: exact in every format.
    a, b = torch.randint(-8, 9, (16, depth)).float(), torch.randint(-8, 9, (depth, 8)).float()
    assert torch.equal(mma(ptx, shape, types, a.to(dtype), b.to(dtype), dtype.itemsize * 8), a @ b)


def test_mma_of_integers(ptx):
    a, b = torch.randint(-128, 128, (16, 32), dtype=torch.int8), torch.randint(-128, 128, (32, 8), dtype=torch.int8)
    got = mma(ptx, "m16n8k32", "s32.s8.s8.s32", a.view(torch.uint8), b.view(torch.uint8), 8)
    assert torch.equal(got, a.int() @ b.int())
