"""What test_emulator.py runs in processes of their own: each function is one test with the emulator switched on."""

import ctypes
import itertools
import os
import signal
import threading
from collections.abc import Callable

import numpy as np

from amx_emulator.emulator import (
    LDTILECFG,
    STTILECFG,
    TILERELEASE,
    Emulator,
    config,
    execute,
    move,
    product,
    tilezero,
)

emulator = Emulator().install()
random = np.random.default_rng(0)
FULL = {t: (16, 64) for t in range(8)}
INTEGERS = {"tdpbssd": (np.int8, np.int8), "tdpbsud": (np.int8, np.uint8), "tdpbusd": (np.uint8, np.int8), "tdpbuud": (np.uint8, np.uint8)}


def configure(tiles: dict[int, tuple[int, int]], start_row: int = 0) -> None:
    data = np.frombuffer(config(tiles, start_row=start_row), np.uint8)
    execute(LDTILECFG, rdi=data.ctypes.data)


def load(tile: int, array: np.ndarray, stride: int | None = None, offset: int = 0, op: str = "tileloadd") -> None:
    execute(move(op, tile), rdi=array.ctypes.data + offset, rsi=array.strides[0] if stride is None else stride)


def store(tile: int, array: np.ndarray, stride: int | None = None, offset: int = 0) -> None:
    execute(move("tilestored", tile), rdi=array.ctypes.data + offset, rsi=array.strides[0] if stride is None else stride)


def contents(tile: int, rows: int = 16, width: int = 64) -> np.ndarray:
    found = np.full((rows, width), 0xEE, np.uint8)
    store(tile, found)
    return found


def random_bytes(*shape: int) -> np.ndarray:
    return random.integers(0, 256, shape, np.uint8)


def test_moves() -> None:
    """Loads, stores and zeroing of whole tiles, by both kinds of load."""
    configure(FULL)
    data = [random_bytes(16, 64) for _ in range(8)]
    for tile in range(8):
        load(tile, data[tile], op=("tileloadd", "tileloaddt1")[tile % 2])
    assert all((contents(tile) == data[tile]).all() for tile in range(8))
    execute(tilezero(3))
    assert not contents(3).any()
    assert (contents(2) == data[2]).all()
    execute(TILERELEASE)
    assert emulator.configured() == 0
    counts = emulator.counts()
    assert counts["tileloadd"] == counts["tileloaddt1"] == 4
    assert (counts["tilezero"], counts["tilestored"], counts["ldtilecfg"], counts["tilerelease"]) == (1, 10, 1, 1)


def test_shapes() -> None:
    """Only rows x bytes are read and written; the rest of a loaded tile is zero."""
    for rows, width in itertools.product((1, 3, 16), (4, 20, 64)):
        configure({0: (rows, width), 1: (16, 64)})
        data, target = random_bytes(16, 64), np.full((16, 64), 0xEE, np.uint8)
        load(0, data)
        store(0, target)
        assert (target[:rows, :width] == data[:rows, :width]).all()
        target[:rows, :width] = 0xEE
        assert (target == 0xEE).all()


def test_strides() -> None:
    """Rows far apart, backwards, and all in one place; scaled registers and displacements in the address."""
    configure(FULL)
    data = random_bytes(64, 128)
    load(0, data, 256, 32)
    assert (contents(0) == data[::2][:16, 32:96]).all()
    load(0, data, -128, 15 * 128)
    assert (contents(0) == data[15::-1, :64]).all()
    load(0, data, 0, 64)
    assert (contents(0) == data[0, 64:]).all()
    execute(bytes.fromhex("c4e27b4b0420"), rax=data.ctypes.data)  # tileloadd (%rax), no index: stride 0
    assert (contents(0) == data[0, :64]).all()
    execute(bytes.fromhex("c4827b4b74c840"), r8=data.ctypes.data, r9=16)  # 0x40(%r8,%r9,8)
    assert (contents(6) == data[:16, 64:]).all()
    execute(bytes.fromhex("c4a27b4b542500"), rbp=data.ctypes.data, r12=128)  # 0(%rbp,%r12)
    assert (contents(2) == data[:16, :64]).all()
    target = np.zeros((64, 64), np.uint8)
    execute(bytes.fromhex("c4827a4b94b500040000"), r13=target.ctypes.data, r14=-16 & (1 << 64) - 1)  # 0x400(%r13,%r14,4)
    assert (target[16:0:-1] == data[:16, :64]).all()
    assert not target[[0, *range(17, 64)]].any()


def test_start_row() -> None:
    """A load or store goes on where an interrupted one stopped, and the next begins at row 0 again."""
    data = random_bytes(16, 64)
    for start in (1, 7, 15):
        configure(FULL, start)
        load(0, data)
        found = contents(0)
        assert not found[:start].any()
        assert (found[start:] == data[start:]).all()
        saved = np.zeros(64, np.uint8)
        execute(STTILECFG, rdi=saved.ctypes.data)
        assert saved[1] == 0
        configure(FULL, start)
        assert (contents(0)[:start] == 0xEE).all()


def test_configuration() -> None:
    """What was loaded comes back; loading and releasing clear all tiles; palette 0 is the initial state."""
    tiles = {t: (t + 1, 4 * t + 4) for t in range(8)}
    data, saved = np.frombuffer(config(tiles), np.uint8), random_bytes(64)
    execute(STTILECFG, rdi=saved.ctypes.data)
    assert not saved.any()
    execute(LDTILECFG, rdi=data.ctypes.data)
    execute(STTILECFG, rdi=saved.ctypes.data)
    assert (saved == data).all()
    load(7, random_bytes(16, 64))
    assert contents(7, 8, 32).any()
    execute(LDTILECFG, rdi=data.ctypes.data)
    assert not contents(7, 8, 32).any()
    for leave in (TILERELEASE, LDTILECFG):
        execute(LDTILECFG, rdi=data.ctypes.data)
        assert emulator.configured() == 1
        execute(leave, rdi=np.zeros(64, np.uint8).ctypes.data)
        execute(STTILECFG, rdi=saved.ctypes.data)
        assert not saved.any()
        assert emulator.configured() == 0
    # ldtilecfg 0x1d(%rip): the address counts from the end of the instruction; a jump leads over the data
    execute(bytes.fromhex("c4e2784905") + (2).to_bytes(4, "little") + b"\xeb\x40" + bytes(config(tiles)))
    execute(STTILECFG, rdi=saved.ctypes.data)
    assert (saved == data).all()


def shapes() -> list[tuple[int, int, int]]:
    """Rows, columns, and 4-byte terms of a product."""
    return list(itertools.product((1, 5, 16), (1, 7, 16), (1, 8, 16)))


def multiply(op: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """c + a times b, by tiles 1, 2 and 3."""
    configure({1: (len(c), c.shape[1] * 4), 2: (len(a), a.nbytes // len(a)), 3: (len(b), b.nbytes // len(b))})
    load(1, c)
    load(2, a)
    load(3, b)
    execute(product(op, 1, 2, 3))
    result = np.empty_like(c)
    store(1, result)
    return result


def test_integers() -> None:
    """All four signs, every shape, extreme values, and sums that wrap around."""
    for op, (kind_a, kind_b) in INTEGERS.items():
        for m, n, k in shapes():
            for extreme in (False, True):
                a, b = (random_bytes(*shape).view(kind) for shape, kind in (((m, 4 * k), kind_a), ((k, 4 * n), kind_b)))
                if extreme:
                    a[:], b[:] = np.iinfo(kind_a).min or 255, 255 if kind_b is np.uint8 else -128
                c = random.integers(-(1 << 31), 1 << 31, (m, n), np.int64).astype(np.int32)
                exact = c.astype(np.int64) + a.astype(np.int64) @ b.reshape(k, n, 4).transpose(0, 2, 1).reshape(4 * k, n).astype(np.int64)
                assert (multiply(op, a, b, c) == exact.astype(np.uint64).astype(np.uint32).view(np.int32)).all(), (op, m, n, k)


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x).astype(np.float32)


def float_reference(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """In the order of the manual, on float32 values; a float64 product of two bf16 or fp16 numbers is exact, and so nearly is its sum."""
    k, n = len(b), b.shape[1] // 2
    sums = np.zeros((len(a), n, 2), np.float32)
    for step, j in itertools.product(range(k), range(2)):
        exact = flushed(a[:, 2 * step + j, None]).astype(np.float64) * flushed(b[step, j::2]).astype(np.float64)
        sums[:, :, j] = flushed((sums[:, :, j].astype(np.float64) + exact).astype(np.float32))
    return flushed(flushed(c) + flushed(sums[:, :, 0] + sums[:, :, 1]))


def as_bf16(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bits, and the float32 values they stand for; rounded towards zero."""
    bits = (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32)


def as_fp16(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.astype(np.float16), x.astype(np.float16).astype(np.float32)


def test_floats() -> None:
    """bf16 and fp16 against the manual's order of sums, to the last bit but one, and against float64 within the bound of rounding."""
    for op, convert in (("tdpbf16ps", as_bf16), ("tdpfp16ps", as_fp16)):
        for m, n, k in shapes():
            (a, wide_a), (b, wide_b) = convert(random.standard_normal((m, 2 * k))), convert(random.standard_normal((k, 2 * n)))
            c = random.standard_normal((m, n)).astype(np.float32)
            found = multiply(op, a, b, c)
            columns = wide_b.reshape(k, n, 2).transpose(0, 2, 1).reshape(2 * k, n).astype(np.float64)
            size = np.abs(wide_a.astype(np.float64)) @ np.abs(columns) + np.abs(c)
            assert (np.abs(found - float_reference(wide_a, wide_b, c)) <= 2.0**-23 * size).all(), (op, m, n, k)
            exact = wide_a.astype(np.float64) @ columns + c
            assert (np.abs(found - exact) <= (k + 3) * 2.0**-24 * size).all(), (op, m, n, k)


def test_special_floats() -> None:
    """Denormals count as zero, on the way in and out, with their sign; NaN and infinities spread as always; small integers are exact."""
    one, least, largest = np.float32(1), np.float32(2.0**-126), np.float32(2.0**127)
    for a, b, c, expected in [
        (one, 2.0**-127, 0, 0.0),  # a factor that is a denormal
        (2.0**-127, one, 0, 0.0),
        (-(2.0**-127), one, -0.0, 0.0),
        (2.0**-64, 2.0**-63, 0, 0.0),  # a product that is one
        (2.0**-63, 2.0**-63, 0, least),
        (0, one, 2.0**-127, 0.0),  # what is added to
        (one, least, -1.5 * least, -0.0),  # a sum
        (largest, 4.0, 0, np.inf),
        (np.inf, 0.0, 1, np.nan),
        (np.inf, one, -np.inf, np.nan),
        (np.nan, one, 1, np.nan),
    ]:
        (bits_a, _), (bits_b, _) = as_bf16(np.array([[a, 0]])), as_bf16(np.array([[b, 0]]))
        found = multiply("tdpbf16ps", bits_a, bits_b, np.array([[c]], np.float32))[0, 0]
        same = found == np.float32(expected) and np.signbit(found) == np.signbit(expected)
        assert same or (np.isnan(found) and np.isnan(expected)), (a, b, c, found, expected)
    (a, wide_a), (b, wide_b) = as_bf16(random.integers(-8, 9, (16, 32))), as_bf16(random.integers(-8, 9, (16, 32)))
    columns = wide_b.reshape(16, 16, 2).transpose(0, 2, 1).reshape(32, 16)
    assert (multiply("tdpbf16ps", a, b, np.ones((16, 16), np.float32)) == wide_a @ columns + 1).all()
    tiny = np.array([[2.0**-24, 2.0**-14]])  # denormal in fp16, normal in the float32 that it is widened to
    bits, wide = as_fp16(tiny)
    assert multiply("tdpfp16ps", bits, bits, np.zeros((1, 1), np.float32))[0, 0] == np.float32((wide.astype(np.float64) ** 2).sum())


def test_zeroed_beyond() -> None:
    """A product leaves zeros beyond the rows and bytes of its destination."""
    configure(FULL)
    junk = random_bytes(16, 64)
    for tile in range(8):
        load(tile, junk)
    execute(product("tdpbuud", 1, 2, 3))
    assert (contents(1).view(np.int32) != junk.view(np.int32)).any()
    assert (contents(2) == junk).all()
    assert (contents(3) == junk).all()


def test_registers_survive() -> None:
    """The handler changes no register of the program: 200 instructions between a value and its use."""
    configure(FULL)
    target = np.zeros(2, np.int64)
    code = tilezero(0) * 200 + bytes.fromhex("4889174989c848894f08")  # mov %rdx,(%rdi); mov %rcx,%r8; mov %rcx,8(%rdi)
    execute(code, rdx=0x0123456789ABCDEF, rcx=77, rdi=target.ctypes.data)
    assert target.tolist() == [0x0123456789ABCDEF, 77]


def test_threads() -> None:
    """Tiles, configuration and counts are each thread's own."""
    emulator.reset()
    barrier, problems = threading.Barrier(4), []

    def work(number: int) -> None:
        try:
            configure({1: (16, 64)}) if number % 2 else configure(FULL)
            data = random_bytes(16, 64)
            for _ in range(50):
                load(1, data)
                barrier.wait()
                assert (contents(1) == data).all()
            execute(TILERELEASE)
        except BaseException as error:
            problems.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems
    assert [counts["tileloadd"] for counts in emulator.threads()] == [50] * 4
    assert emulator.configured() == 0


def test_violations() -> None:
    """A broken rule ends the process, and the message names the fault, the rule, the instruction and its tiles; a child for each."""
    for name, (message, broken) in VIOLATIONS.items():
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(write, 2)
            broken(random_bytes(16, 64))
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            text = pipe.read()
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status), f"{name}: nothing happened"
        assert os.WTERMSIG(status) == signal.SIGABRT, f"{name}: signal {os.WTERMSIG(status)}"
        assert f"amx emulator: {message}" in text, f"{name}: {text}"


def previous_handler() -> None:
    """Leaves with status 7, by the handler that was there before the emulator, at an instruction that is none of AMX."""
    emulator.uninstall()
    libc = ctypes.CDLL(None)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, kind]
    handler = kind(lambda number: os._exit(7))
    libc.signal(signal.SIGILL, handler)
    emulator.install()
    configure(FULL)
    assert emulator.configured() == 1
    illegal_instruction()


def illegal_instruction() -> None:
    execute(bytes.fromhex("0f0b"))  # ud2


def _load_raw(**changes: int) -> None:
    raw = config(FULL)
    for place, value in changes.items():
        raw[int(place[1:])] = value
    execute(LDTILECFG, rdi=np.frombuffer(raw, np.uint8).ctypes.data)


Broken = Callable[[np.ndarray], None]


def _unconfigured(code: bytes) -> Broken:
    return lambda data: execute(code, rdi=data.ctypes.data, rsi=64)


def _product(op: str, tiles: dict[int, tuple[int, int]], d: int = 1, a: int = 2, b: int = 3) -> Broken:
    def run(_: np.ndarray) -> None:
        configure(tiles)
        execute(product(op, d, a, b))

    return run


def _with(tiles: dict[int, tuple[int, int]], code: bytes, start_row: int = 0) -> Broken:
    def run(data: np.ndarray) -> None:
        configure(tiles, start_row)
        execute(code, rdi=data.ctypes.data, rsi=64)

    return run


def _square(**changes: tuple[int, int]) -> dict[int, tuple[int, int]]:
    return FULL | {int(name[1:]): value for name, value in changes.items()}


VIOLATIONS: dict[str, tuple[str, Broken]] = {
    "palette": ("#GP: the palette", lambda _: _load_raw(_0=2)),
    "reserved 2": ("#GP: reserved", lambda _: _load_raw(_2=1)),
    "reserved 15": ("#GP: reserved", lambda _: _load_raw(_15=1)),
    "reserved 32": ("#GP: reserved", lambda _: _load_raw(_32=1)),
    "reserved 47": ("#GP: reserved", lambda _: _load_raw(_47=1)),
    "reserved 56": ("#GP: reserved", lambda _: _load_raw(_56=1)),
    "reserved 63": ("#GP: reserved", lambda _: _load_raw(_63=1)),
    "65 bytes": ("#GP: a tile must not have more than 64 bytes", lambda _: _load_raw(_16=65)),
    "256 bytes": ("#GP: a tile must not have more than 64 bytes", lambda _: _load_raw(_31=1)),
    "17 rows": ("#GP: a tile must not have more than 16 rows", lambda _: _load_raw(_55=17)),
    "rows without bytes": ("#GP: rows and bytes", lambda _: _load_raw(_16=0)),
    "bytes without rows": ("#GP: rows and bytes", lambda _: _load_raw(_48=0)),
    "zero before configuring": ("#UD: no configuration", _unconfigured(tilezero(0))),
    "load before configuring": ("#UD: no configuration", _unconfigured(move("tileloadd", 0))),
    "load t1 before configuring": ("#UD: no configuration", _unconfigured(move("tileloaddt1", 0))),
    "store before configuring": ("#UD: no configuration", _unconfigured(move("tilestored", 0))),
    "product before configuring": ("#UD: no configuration", _unconfigured(product("tdpbssd", 0, 1, 2))),
    "zero of no tile": ("#UD: the tile is not configured, at tilezero tmm7", _with({0: (16, 64)}, tilezero(7))),
    "load of no tile": ("#UD: the tile is not configured, at tileloadd tmm5", _with({0: (16, 64)}, move("tileloadd", 5))),
    "store of no tile": ("#UD: the tile is not configured, at tilestored tmm5", _with({0: (16, 64)}, move("tilestored", 5))),
    "odd bytes": ("#UD: a row must be a multiple of four bytes", _with({0: (16, 63)}, move("tileloadd", 0))),
    "start row of a load": ("#UD: the start row", _with({0: (5, 64)}, move("tileloadd", 0), 5)),
    "start row of a store": ("#UD: the start row", _with({0: (5, 64)}, move("tilestored", 0), 15)),
    "d is a": ("#UD: the three tiles must be different ones, at tdpbssd tmm1 tmm1 tmm3", _product("tdpbssd", FULL, 1, 1, 3)),
    "d is b": ("#UD: the three tiles must be different ones, at tdpbf16ps tmm3 tmm1 tmm3", _product("tdpbf16ps", FULL, 3, 1, 3)),
    "a is b": ("#UD: the three tiles must be different ones, at tdpfp16ps tmm1 tmm2 tmm2", _product("tdpfp16ps", FULL, 1, 2, 2)),
    "no d": ("#UD: the tile is not configured", _product("tdpbuud", {2: (16, 64), 3: (16, 64)})),
    "columns": ("#UD: destination and second factor", _product("tdpbusd", _square(_1=(16, 60)))),
    "rows": ("#UD: destination and first factor", _product("tdpbsud", _square(_2=(15, 64)))),
    "terms": ("#UD: the second factor must have a row for every four bytes", _product("tdpbf16ps", _square(_3=(15, 64)))),
}
