"""Every check catches a planted defect, names the place, and leaves the sound twin of the program alone."""

import re

import pytest
import torch
from ptx.test_ptx_control import launch


def kind_of(ptx, *args, **options):
    with pytest.raises(ptx.PTXError) as caught:
        launch(ptx, *args, **options)
    return caught.value.kind


STORE = "mul.wide.u32 %d1, %r0, 4; add.u64 %d1, %d1, %d40; {} st.global.u32 [%d1{}], %r0;"
# A value goes through shared memory to the thread 33 further: another lane of another warp.
EXCHANGE = """.shared .align 4 .b32 buffer[64]; mov.u32 %r9, buffer; shl.b32 %r1, %r0, 2; add.u32 %r1, %r1, %r9;
    add.u32 %r2, %r0, 33; and.b32 %r2, %r2, 63; shl.b32 %r2, %r2, 2; add.u32 %r2, %r2, %r9;
    st.shared.u32 [%r1], %r0; {between} ld.shared.u32 %r3, [%r2]; {after}"""


def test_out_of_bounds(ptx):
    x = torch.zeros(33)
    launch(ptx, STORE.format("", ""), x)
    with pytest.raises(ptx.PTXError, match="'p0'") as caught:
        launch(ptx, STORE.format("", "+8"), x)
    assert (caught.value.kind, caught.value.tensor) == ("out-of-bounds", "p0") and caught.value.line > 0
    assert kind_of(ptx, "ld.shared.u32 %r1, [4];", x) == "out-of-bounds"
    assert kind_of(ptx, "mov.u64 %d1, 0; ld.global.u32 %r1, [%d1];", x) == "out-of-bounds"


def test_views_into_larger_buffers(ptx):
    """Neighbours in the storage, and elements between those of a strided view, are out of bounds."""
    storage = torch.zeros(128)
    launch(ptx, STORE.format("", ""), storage[32:64])
    assert kind_of(ptx, STORE.format("", ""), storage[32:48]) == "out-of-bounds"
    assert kind_of(ptx, STORE.format("", ""), storage[::2]) == "out-of-bounds"
    launch(ptx, STORE.format("", ""), storage[::2], storage[1::2])


def test_misaligned(ptx):
    assert kind_of(ptx, "ld.global.v2.u32 {%r1, %r2}, [%d40+4];", torch.zeros(8)) == "misaligned"
    assert (
        kind_of(ptx, ".shared .align 16 .b8 s[32]; mov.u32 %r1, s; st.shared.u32 [%r1+2], %r0;", torch.zeros(8))
        == "misaligned"
    )


def test_uninitialised(ptx):
    x, y = torch.zeros(32), torch.zeros(32)
    body = "ld.global.u32 %r1, [%d40];"
    launch(ptx, body, x)
    assert kind_of(ptx, body, x, poison=["p0"]) == "uninitialised"
    assert kind_of(ptx, ".shared .b32 s; ld.shared.u32 %r1, [s];", x) == "uninitialised"
    result = launch(ptx, "@%p0 bra L; L: setp.lt.u32 %p1, %r0, 10;" + STORE.format("@%p1", ""), y, poison=["p0"])
    assert result.unwritten == {"p0": 22 * 4} and y[10:].isnan().all()


@pytest.mark.parametrize("seed", range(3))
def test_shared_hazards(ptx, seed):
    x = torch.zeros(1)
    launch(
        ptx,
        EXCHANGE.format(between="bar.sync 0;", after="bar.sync 0; st.shared.u32 [%r1], %r3;"),
        x,
        block=64,
        seed=seed,
    )
    # read after write (which thread comes first decides whether it is seen as never written), then write after read
    missing = kind_of(ptx, EXCHANGE.format(between="", after=""), x, block=64, seed=seed)
    assert missing in ("shared-hazard", "uninitialised")
    overwrite = EXCHANGE.format(between="bar.sync 0;", after="st.shared.u32 [%r1], %r3;")
    assert kind_of(ptx, overwrite, x, block=64, seed=seed) == "shared-hazard"
    assert kind_of(ptx, ".shared .b32 s; st.shared.u32 [s], %r0;", x, block=64, seed=seed) == "shared-hazard"
    launch(ptx, ".shared .b32 s; st.shared.u32 [s], 7;", x, block=64, seed=seed)  # one value: harmless


def test_hazards_between_lanes_of_a_warp(ptx):
    x = torch.zeros(1)
    body = EXCHANGE.replace("33", "1").replace("63", "31")
    launch(ptx, body.format(between="bar.warp.sync -1;", after=""), x)
    assert kind_of(ptx, body.format(between="", after=""), x) == "shared-hazard"
    launch(ptx, body.format(between="", after=""), x, check_lanes=False)


def test_named_barrier_orders_only_those_who_arrive(ptx):
    """Warps 0 and 1 meet at barrier 1, and warp 2 at barrier 2 with nobody who knows of warp 0."""
    body = """.shared .b32 s; shr.u32 %r1, %r0, 5; setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.u32 [s], 5;
    setp.ge.u32 %p2, %r1, {last}; @%p2 bra other; bar.sync 1, 64; bra join; other: bar.sync 2, {count};
    join: setp.eq.u32 %p3, %r1, {reader}; @%p3 ld.shared.u32 %r2, [s];"""
    x = torch.zeros(1)
    launch(ptx, body.format(last=2, count=64, reader=1), x, block=128)
    for seed in range(3):
        assert kind_of(ptx, body.format(last=2, count=64, reader=2), x, block=128, seed=seed) in (
            "shared-hazard",
            "uninitialised",
        )


def test_global_races(ptx):
    cell, y = torch.zeros(1, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    assert kind_of(ptx, "mov.u32 %r1, %ctaid.x; st.global.u32 [%d40], %r1;", cell, block=1, grid=2) == "global-race"
    assert kind_of(ptx, "st.global.u32 [%d40], %r0;", cell, block=64) == "global-race"
    launch(ptx, "red.global.add.u32 [%d40], 1;", cell, block=64, grid=2)
    mixed = (
        "mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0; @%p1 st.global.u32 [%d40], 1; @!%p1 ld.global.u32 %r2, [%d40];"
    )
    for seed in range(4):  # the reading block may come first or last
        assert kind_of(ptx, mixed, cell, block=1, grid=2, seed=seed) == "global-race"
    exchange = """mul.wide.u32 %d1, %r0, 4; add.u64 %d1, %d1, %d40; st.global.u32 [%d1], %r0; {} xor.b32 %r1, %r0, 32;
    mul.wide.u32 %d2, %r1, 4; add.u64 %d2, %d2, %d40; ld.global.u32 %r2, [%d2];"""
    launch(ptx, exchange.format("bar.sync 0;"), y, block=64)
    assert kind_of(ptx, exchange.format(""), y, block=64) == "global-race"


def test_read_only_loads_of_written_memory(ptx):
    x = torch.zeros(32)
    assert kind_of(ptx, "ld.global.nc.u32 %r1, [%d40]; bar.sync 0;" + STORE.format("", ""), x) == "read-only"
    assert kind_of(ptx, STORE.format("", "") + "bar.sync 0; ld.global.nc.u32 %r1, [%d40];", x) == "read-only"


def test_divergence(ptx):
    x = torch.zeros(1)
    split = "setp.lt.u32 %p1, %r0, 7; @%p1 bra A; {} bra B; A: {} B:"
    launch(ptx, split.format("", "") + "bar.sync 0;", x, block=64)
    assert kind_of(ptx, split.format("bar.sync 0;", "bar.sync 0;"), x) == "divergence"
    assert kind_of(ptx, split.format("", "shfl.sync.idx.b32 %r1, %r0, 0, 31, -1;"), x) == "divergence"
    assert kind_of(ptx, "setp.lt.u32 %p1, %r0, 7; @%p1 bar.sync 0;", x) == "divergence"
    assert kind_of(ptx, "setp.lt.u32 %p1, %r0, 7; @%p1 ret; shfl.sync.idx.b32 %r1, %r0, 31, 31, -1;", x) == "divergence"
    assert kind_of(ptx, "shfl.sync.idx.b32 %r1, %r0, 0, 31, 15;", x) == "divergence"
    # One warp waits at a barrier that another has passed by.
    assert kind_of(ptx, "setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 1; @!%p1 bar.sync 2;", x, block=64) == "barrier"


COPY = """.shared .align 16 .b8 s[1024]; mov.u32 %r9, s; shl.b32 %r1, %r0, 4; cvt.u64.u32 %d1, %r1;
    add.u32 %r1, %r1, %r9;
    add.u64 %d1, %d1, %d40; {before} cp.async.cg.shared.global [%r1], [%d1], 16; cp.async.commit_group; {wait}
    xor.b32 %r2, %r1, {other}; ld.shared.u32 %r3, [%r2];"""


def test_copies_in_flight(ptx):
    x = torch.zeros(256)
    wait, everyone = "cp.async.wait_group 0;", "cp.async.wait_group 0; bar.sync 0;"
    launch(ptx, COPY.format(before="", wait=wait, other=0), x, block=64)
    launch(ptx, COPY.format(before="", wait=everyone, other=512), x, block=64)
    launch(ptx, COPY.format(before="", wait=everyone, other=16), x, block=64)
    assert kind_of(ptx, COPY.format(before="", wait="", other=0), x, block=64) == "in-flight"
    assert kind_of(ptx, COPY.format(before="", wait="cp.async.wait_group 1;", other=0), x, block=64) == "in-flight"
    assert kind_of(ptx, COPY.format(before="", wait="st.shared.u32 [%r1], %r0;", other=0), x, block=64) == "in-flight"
    # A wait makes a thread's own copies visible, to that thread alone.
    assert kind_of(ptx, COPY.format(before="", wait=wait, other=16), x, block=64) == "shared-hazard"
    assert kind_of(ptx, COPY.format(before="", wait="bar.sync 0;" + wait, other=512), x, block=64) in (
        "shared-hazard",
        "in-flight",
    )
    # The issue is a write: of what another warp still reads, and of a source that must be there.
    reader = "st.shared.u32 [%r1], %r0; bar.sync 0; xor.b32 %r2, %r1, 512; ld.shared.u32 %r3, [%r2];"
    assert kind_of(ptx, COPY.format(before=reader, wait=everyone, other=0), x, block=64) == "shared-hazard"
    assert kind_of(ptx, COPY.format(before="", wait=everyone, other=0), torch.zeros(128), block=64) == "out-of-bounds"
    assert kind_of(ptx, COPY.format(before="", wait=everyone, other=0), x, block=64, poison=["p0"]) == "uninitialised"


SYNCHRONISATION = re.compile(r"^\s*(bar\.sync|cp\.async\.wait|cp\.async\.commit)[^;]*;", re.M)


def test_each_synchronisation_of_the_gemm_is_needed(ptx, sample):
    """With any one barrier, wait or commit removed, the checker stops the kernel, whatever the order of the warps."""
    text = sample("gemm")
    torch.manual_seed(0)
    a, b, c = torch.randn(64, 128).bfloat16(), torch.randn(64, 128).bfloat16(), torch.empty(64, 64)
    found = list(SYNCHRONISATION.finditer(text))
    assert len(found) == 6
    for place in found:
        module = ptx.Module(text[: place.start()] + "\n" * place.group().count("\n") + text[place.end() :])
        for seed in range(2):
            with pytest.raises(ptx.PTXError) as caught:
                module.launch("gemm_bf16", (1, 1), (128,), {"a": a, "b": b, "c": c, "N": 64, "K": 128}, 16384, seed)
            assert caught.value.kind in ("in-flight", "shared-hazard", "uninitialised"), place.group()
            assert re.fullmatch(r"gemm\.cu:\d+", caught.value.source)


WGMMA = re.compile(r"^\s*(bar\.sync|wgmma\.fence|wgmma\.wait|wgmma\.commit|fence\.proxy)[^;]*;", re.M)


def test_each_synchronisation_of_a_wgmma_kernel_is_needed(ptx, triton_kernels):
    kernel = triton_kernels.matmul("bf16", 90)
    text = kernel.asm["ptx"]
    torch.manual_seed(0)
    a, b = torch.randn(64, 160).bfloat16(), torch.randn(160, 64).bfloat16()
    c = torch.empty(64, 64, dtype=torch.bfloat16)
    found = list(WGMMA.finditer(text))
    assert {place.group(1) for place in found} == {
        "bar.sync",
        "wgmma.fence",
        "wgmma.wait",
        "wgmma.commit",
        "fence.proxy",
    }
    for place in found:
        module = ptx.Module(text[: place.start()] + text[place.end() :])
        with pytest.raises(ptx.PTXError) as caught:
            module.launch(
                "matmul_kernel", (1, 1), (128,), [a, b, c, 64, 64, 160, 160, 1, 64, 1, 64], kernel.metadata.shared
            )
        expected = {
            "wgmma.fence": {"wgmma-fence"},
            "fence.proxy": {"proxy-fence"},
            "bar.sync": {"shared-hazard", "uninitialised"},
        }
        assert caught.value.kind in expected.get(place.group(1), {"in-flight"}), place.group()


def test_mbarriers(ptx):
    """Warp 0 writes and arrives; warp 1 reads after it has waited, or without."""
    body = """.shared .align 8 .b64 ready; .shared .align 4 .b32 s; setp.eq.u32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared::cta.b64 [ready], 1; {barrier} setp.ge.u32 %p2, %r0, 32; @%p2 bra wait;
    @%p1 st.shared.u32 [s], 5; @%p1 mbarrier.arrive.shared::cta.b64 %d1, [ready]; ret;
    wait: {wait} ld.shared.u32 %r1, [s];"""
    wait = "mbarrier.try_wait.parity.shared::cta.b64 %p3, [ready], 0; @!%p3 bra wait;"
    x = torch.zeros(1)
    for seed in range(3):
        options = {"block": 64, "seed": seed, "target": "sm_90"}
        launch(ptx, body.format(barrier="bar.sync 0;", wait=wait), x, **options)
        assert kind_of(ptx, body.format(barrier="bar.sync 0;", wait=""), x, **options) in (
            "shared-hazard",
            "uninitialised",
        )
        assert kind_of(ptx, body.format(barrier="", wait=wait), x, **options) in ("shared-hazard", "mbarrier")


def test_an_mbarrier_that_nobody_completes(ptx):
    """Spinning warps are told from an endless loop: nobody is left who could end the phase."""
    body = """.shared .align 8 .b64 ready; setp.eq.u32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared::cta.b64 [ready], 2; bar.sync 0; @%p1 mbarrier.arrive.shared::cta.b64 _, [ready];
    wait: mbarrier.try_wait.parity.shared::cta.b64 %p3, [ready], 0; @!%p3 bra wait;"""
    assert kind_of(ptx, body, block=64, target="sm_90") == "mbarrier"


@pytest.mark.parametrize(
    "release, take, kind",
    [(40, 240, "mbarrier"), (40, 228, "setmaxnreg"), (16, 232, "setmaxnreg"), (176, 168, "setmaxnreg")],
)
def test_registers_that_are_not_there(ptx, release, take, kind):
    """More than was released never comes; numbers that no warp can have; the wrong direction."""
    body = f"""setp.lt.u32 %p1, %r0, 128; @%p1 bra release; setmaxnreg.inc.sync.aligned.u32 {take}; bra done;
    release: setmaxnreg.dec.sync.aligned.u32 {release}; done: bar.sync 0;"""
    options = {"block": 384, "target": "sm_90a"}
    assert kind_of(ptx, body, directives=".maxntid 384", **options) == kind
    assert kind_of(ptx, body, **options) == "setmaxnreg"
