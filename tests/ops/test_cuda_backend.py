"""The CUDA backend: its sources compile, and its kernels agree with the reference.

Without a GPU the kernels run on the host, compiled against tests/ops/cuda_emulation; with one, the
same tests run on it too, and those of streams, graphs and synchronisation.
"""

import ctypes
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ctt.ops import reference
from ctt.ops._plans import plan_of
from ctt.ops._sources import digest
from ctt.ops.backends import cuda

SOURCE = Path(__file__).parents[2] / "csrc" / "cuda"
CHECKSUM = f'-DCTT_SOURCES="{digest("cuda")}"'
EMULATION = Path(__file__).parent / "cuda_emulation"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
gpu = (pytest.mark.gpu, needs_gpu)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def cuda_ema_(teacher: list[Tensor], student: list[Tensor], decay: float | Tensor) -> None:
    cuda.ema_update_(teacher, student, decay, plan_of(teacher, student))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The library for one architecture and what the assembler said about each kernel."""
    if NVCC is None:
        pytest.skip("needs nvcc")
    folder = tmp_path_factory.mktemp("nvcc")
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    flags = f"-std=c++17 -O3 --extended-lambda -arch=sm_{capability[0]}{capability[1]} -Xptxas -v"

    def build(source: Path) -> tuple[str, str]:
        target = str(folder / f"{source.stem}.o")
        options = [*flags.split(), CHECKSUM, "-Xcompiler", "-fPIC"]
        command = [NVCC, *options, "-c", str(source), "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target, done.stdout + done.stderr

    objects, reports = zip(*ThreadPoolExecutor(2).map(build, SOURCE.glob("*.cu")), strict=True)
    library = folder / cuda.LIBRARY.name
    command = [NVCC, "-shared", "-cudart", "static", *objects, "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True)
    return library, "".join(reports)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library compiled for the host; only the toolkit's headers are needed."""
    compiler = shutil.which("g++")
    if NVCC is None or compiler is None:
        pytest.skip("needs g++ and the headers that come with nvcc")
    dryrun = subprocess.run(
        [NVCC, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True
    )
    top = re.search(r"TOP=(\S+)", dryrun.stderr)
    if top is None:
        pytest.skip("nvcc does not tell where its headers are")
    folder = tmp_path_factory.mktemp("emulated")
    include = [f"-I{EMULATION}", f"-I{SOURCE}", f"-isystem{top[1]}/include"]

    def build(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        flags = ["-std=c++17", "-O1", "-fPIC", "-Wno-unknown-pragmas", CHECKSUM, *include]
        command = [compiler, *flags, "-x", "c++", "-c", str(source), "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target

    objects = ThreadPoolExecutor(2).map(build, SOURCE.glob("*.cu"))
    library = folder / "libctt_cuda_emulated.so"
    subprocess.run([compiler, "-shared", *objects, "-o", str(library)], check=True)
    return library


Launches = Callable[[], int]


@pytest.fixture
def launches(emulated: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Sends the backend's calls to the emulated kernels; gives the launches made since then."""
    library = cuda.load(emulated)

    def launch(operation: str, device: torch.device, *arguments: float | bytes) -> None:
        entry = getattr(library, f"ctt_cuda_{operation.rstrip('_')}")
        assert entry(*arguments, 0, None) == 0

    monkeypatch.setattr(cuda, "load", lambda path: library)
    monkeypatch.setattr(cuda, "_launch", launch)
    cuda._workspace_bytes.cache_clear()
    start = library.emulated_launches()
    yield lambda: library.emulated_launches() - start
    cuda._workspace_bytes.cache_clear()


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "emulated":
        request.getfixturevalue("launches")
        return torch.device("cpu")
    if not cuda.LIBRARY.exists():
        monkeypatch.setattr(cuda, "LIBRARY", request.getfixturevalue("compiled")[0])
    return torch.device("cuda", torch.cuda.current_device())


# -- build


@needs_nvcc
def test_every_kernel_stays_in_registers(compiled: tuple[Path, str]) -> None:
    report = compiled[1]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    assert len(spills) >= 20, "the assembler no longer reports every kernel"
    assert set(spills) == {("0", "0")}
    shared = [int(size) for size in re.findall(r"(\d+) bytes smem", report)]
    assert max(shared) <= 48 * 1024, "more than a kernel gets without opting in"


@needs_nvcc
def test_library_loads_without_a_driver(compiled: tuple[Path, str]) -> None:
    library = cuda.load(compiled[0])
    assert library.ctt_cuda_error_text(0) == b"no error"
    assert library.ctt_cuda_class_topk_workspace(8580, 19, 256, 0) == 0
    if not torch.cuda.is_available():
        assert library.ctt_cuda_probe(0) != 0
    assert library.ctt_cuda_sources().decode() == digest("cuda")


def test_declared_arguments_are_those_of_the_sources() -> None:
    sources = "\n".join(path.read_text() for path in sorted(SOURCE.glob("*.cu")))
    entries = re.findall(r"CTT_EXPORT ([\w ]+?\**) ?(ctt_\w+)\(([^)]*)\)", sources)
    assert {name for _, name, _ in entries} == set(cuda.SIGNATURES)
    types = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "double": ctypes.c_double}
    for result, name, arguments in entries:
        declared_result, declared = cuda.SIGNATURES[name]
        assert declared_result == types.get(result, ctypes.c_char_p)
        assert [
            ctypes.c_void_p if "*" in argument else types[argument.split()[0]]
            for argument in filter(None, arguments.split(","))
        ] == declared, name


# -- who may run it


def test_reasons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    card = torch.device("cuda", 0)
    assert "not on cpu" in (cuda.why_not("class_topk", torch.device("cpu")) or "")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in (cuda.why_not("class_topk", card) or "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda, "LIBRARY", tmp_path / "libctt_cuda.so")
    assert "nvcc" in (cuda.why_not("class_topk", card) or "")
    cuda.LIBRARY.write_bytes(b"no library")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in (cuda.why_not("class_topk", card) or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0 or later, Old Card has 7.5" in (cuda.why_not("class_topk", card) or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert "does not load" in (cuda.why_not("class_topk", card) or "")


# -- ema_update_


def guarded(count: int, dtype: torch.dtype, device: torch.device, offset: int) -> Tensor:
    """A buffer of random values with room around the `count` from `offset` on."""
    return torch.randn(offset + count + 8, device=device).to(dtype)


@pytest.mark.parametrize(("t_dtype", "s_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_ema_every_dtype(device: torch.device, t_dtype: torch.dtype, s_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shapes = [(1, 0), (5, 1), (4096, 0), (4096, 3), (4097, 0), (8195, 1)]  # elements, offset
    teachers = [guarded(n, t_dtype, device, offset) for n, offset in shapes]
    students = [guarded(n, s_dtype, device, offset % 2) for n, offset in shapes]
    expected = [t.clone() for t in teachers]

    def inner(buffers: list[Tensor], odd: bool = False) -> list[Tensor]:
        starts = [offset % 2 if odd else offset for _, offset in shapes]
        return [b[i : i + n] for b, i, (n, _) in zip(buffers, starts, shapes, strict=True)]

    reference.ema_update_(inner(expected), inner(students, odd=True), 0.9)
    cuda_ema_(inner(teachers), inner(students, odd=True), 0.9)
    torch.testing.assert_close(teachers, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("on_device", [True, False])
def test_ema_decay_in_a_tensor(device: torch.device, dtype: torch.dtype, on_device: bool) -> None:
    decay = torch.tensor(0.3, dtype=dtype, device=device if on_device else "cpu")
    for wide in (torch.float32, torch.float64):
        teacher, student = (torch.randn(33, dtype=wide, device=device) for _ in range(2))
        expected = teacher.clone()
        reference.ema_update_([expected], [student], decay)
        cuda_ema_([teacher], [student], decay)
        tolerance = {} if on_device else {"atol": 2e-3, "rtol": 2e-3}  # 1 - decay is not rounded
        torch.testing.assert_close(teacher, expected, **tolerance)


def test_ema_layouts(device: torch.device) -> None:
    torch.manual_seed(0)

    def make() -> list[Tensor]:
        image = torch.randn(2, 5, 3, 4, device=device)
        return [
            image.contiguous(memory_format=torch.channels_last),  # the same order on both sides
            torch.randn(4, 6, device=device).T,
            torch.randn(1, 7, device=device)[:, ::2],  # gaps
            torch.randn(0, 3, device=device),
            torch.randn((), device=device),
        ]

    teacher, student = make(), make()
    teacher.append(torch.randn(4, 6, device=device).T)
    student.append(torch.randn(6, 4, device=device))  # another order
    teacher.append(teacher[0])  # a tied weight is updated twice
    student.append(student[0])
    expected = [t.clone() for t in teacher[:-1]]
    expected.append(expected[0])
    reference.ema_update_(expected, student, 0.9)
    cuda_ema_(teacher, student, 0.9)
    torch.testing.assert_close(teacher, expected)
    assert plan_of(teacher, student).tables["cuda"].irregular == [2, 5, 6]


def test_ema_is_one_launch(launches: Launches) -> None:
    teacher = [torch.ones(n % 9 + 1) for n in range(1300)]
    student = [torch.zeros_like(t) for t in teacher]
    cuda_ema_(teacher, student, 0.5)
    assert launches() == 1
    assert all((t == 0.5).all() for t in teacher)


def test_ema_more_tensors_than_one_launch_takes(launches: Launches) -> None:
    teacher = [torch.ones(1) for _ in range(1400)]
    cuda_ema_(teacher, [torch.zeros(1) for _ in teacher], 0.5)
    assert launches() == 2
    assert torch.cat(teacher).eq(0.5).all()


# -- class_topk


def assert_same_choice(
    confidence: Tensor, label: Tensor, k: int, num_classes: int, valid: Tensor | None = None
) -> None:
    index, count = cuda.class_topk(confidence, label, k, num_classes, valid)
    expected = reference.class_topk(confidence, label, k, num_classes, valid)
    assert torch.equal(index, expected[0])
    assert torch.equal(count, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("pixels", "num_classes", "k"),
    [(0, 3, 5), (1, 2, 1), (123, 19, 7), (123, 2, 300), (600, 40, 9), (8580, 2, 256)],
)
@pytest.mark.parametrize("levels", [1, 5, 10**6])  # few levels make many ties
def test_topk(
    device: torch.device, dtype: torch.dtype, pixels: int, num_classes: int, k: int, levels: int
) -> None:
    generator = torch.Generator().manual_seed(pixels + levels)
    confidence = (torch.rand(pixels, generator=generator) * levels).ceil() / levels
    label = torch.randint(-1, num_classes + 1, (pixels,), generator=generator)
    label[label == num_classes] = 255
    valid = torch.rand(pixels, generator=generator) > 0.2
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, -1.5, 1e-40])
    spread = torch.randperm(pixels, generator=generator)[: 20 * len(special)]
    confidence[spread] = special.repeat(20)[: len(spread)]
    arguments = confidence.to(device, dtype), label.to(device), k, num_classes
    assert_same_choice(*arguments)
    assert_same_choice(*arguments, valid.to(device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", ["rising", "falling", "equal"])
@pytest.mark.parametrize("share", [0.02, 1.0])
def test_topk_of_many_pixels(
    device: torch.device, dtype: torch.dtype, order: str, share: float
) -> None:
    """Several blocks per class; a rising order refills the pool at every step."""
    pixels, k = 30_001, 1000
    confidence = torch.linspace(0, 1, pixels, dtype=dtype, device=device)
    if order == "falling":
        confidence = confidence.flip(0)
    elif order == "equal":
        confidence = torch.ones_like(confidence)
    torch.manual_seed(0)
    label = (torch.rand(pixels, device=device) > share).long()
    assert_same_choice(confidence, label, k, 2)


def test_topk_strided(device: torch.device) -> None:
    torch.manual_seed(0)
    confidence = torch.rand(500, 3, device=device)[:, 1]
    label = torch.randint(0, 4, (2, 500), device=device).T[:, 1]
    valid = (torch.rand(1000, device=device) > 0.5)[::2]
    assert_same_choice(confidence, label[:500], 20, 4, valid)
    assert_same_choice(torch.ones((), device=device).expand(500), label, 20, 4, valid)


def test_topk_launches(launches: Launches) -> None:
    for pixels, expected in ((8580, 1), (33_620, 2)):
        before = launches()
        cuda.class_topk(torch.rand(pixels), torch.zeros(pixels, dtype=torch.int64), 256, 1, None)
        assert launches() - before == expected


def test_topk_beyond_shared_memory_goes_elsewhere(
    launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "select", lambda operation, backend, device: reference)
    assert_same_choice(torch.rand(5000), torch.randint(0, 2, (5000,)), 2049, 2)
    assert_same_choice(torch.rand(5000).double(), torch.randint(0, 2, (5000,)), 1025, 2)
    assert launches() == 0


# -- queue_push_


@pytest.mark.parametrize("key_dtype", DTYPES)
@pytest.mark.parametrize("feature_dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_classes", "capacity", "dim", "rows", "entries"),
    [
        (3, 7, 19, 40, 5),
        (2, 7, 64, 50, 20),
        (2, 128, 256, 300, 70),
        (1, 1, 1, 9, 3),
        (2, 5, 3, 0, 4),
    ],
)
def test_push(
    device: torch.device,
    key_dtype: torch.dtype,
    feature_dtype: torch.dtype,
    num_classes: int,
    capacity: int,
    dim: int,
    rows: int,
    entries: int,
) -> None:
    torch.manual_seed(0)
    features = torch.randn(rows, dim, device=device).to(feature_dtype)
    if rows:
        features[0] = 0
        features[1, 0] = torch.nan
        features[rows // 2, dim // 2] = torch.inf
    ours = [
        torch.zeros(num_classes, capacity, dim, dtype=key_dtype, device=device),
        torch.zeros(num_classes, dtype=torch.int64, device=device),
        torch.zeros(num_classes, dtype=torch.int64, device=device),
    ]
    expected = [x.clone() for x in ours]
    for _ in range(3):
        index = torch.randint(-2, rows + 2, (num_classes, entries), device=device)
        index[0, 0] = torch.iinfo(torch.int64).max
        cuda.queue_push_(*ours, features, index)
        reference.queue_push_(*expected, features, index)
        torch.testing.assert_close(ours, expected)


def test_push_of_more_entries_than_a_block_has_threads(device: torch.device) -> None:
    torch.manual_seed(0)
    features = torch.randn(2000, 4, device=device)
    for capacity in (600, 1300, 5000):
        ours = [
            torch.zeros(2, capacity, 4, device=device),
            torch.tensor([0, capacity], device=device),
            torch.tensor([capacity - 1, 3], device=device),
        ]
        expected = [x.clone() for x in ours]
        index = torch.randint(-1000, 2000, (2, 1500), device=device)
        cuda.queue_push_(*ours, features, index)
        reference.queue_push_(*expected, features, index)
        torch.testing.assert_close(ours, expected)


def test_push_strided(device: torch.device) -> None:
    torch.manual_seed(0)
    features = torch.randn(12, 30, device=device).T
    wide = [
        torch.zeros(3, 10, 24, device=device),
        torch.zeros(6, dtype=torch.int64, device=device),
        torch.zeros(3, 2, dtype=torch.int64, device=device),
    ]
    expected = [x.clone() for x in wide]
    index = torch.randint(-1, 30, (8, 3), device=device).T

    def views(x: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return x[0][:, ::2, ::2], x[1][::2], x[2][:, 1]

    cuda.queue_push_(*views(wide), features, index)
    reference.queue_push_(*views(expected), features, index)
    torch.testing.assert_close(wide, expected)


def test_push_of_nothing(device: torch.device) -> None:
    bank = [torch.ones(2, 3, 4), torch.ones(2).long(), torch.ones(2).long()]
    ours = [x.to(device) for x in bank]
    cuda.queue_push_(*ours, torch.randn(5, 4, device=device), ours[1].new_zeros(2, 0))
    cuda.queue_push_(*ours, torch.randn(5, 4, device=device), ours[1].new_full((2, 4), -1))
    assert all(torch.equal(x.cpu(), y) for x, y in zip(ours, bank, strict=True))


def test_push_with_a_broken_cursor_stays_inside(device: torch.device) -> None:
    keys = torch.zeros(3, 4, 8, device=device)
    count, cursor = (torch.tensor(x, device=device) for x in ([0, 0, 0], [0, -3, 0]))
    features = torch.ones(2, 8, device=device)
    index = torch.tensor([[-1, -1], [0, 1], [-1, -1]], device=device)
    cuda.queue_push_(keys, count, cursor, features, index)
    assert keys[1].sum() == keys.sum() > 0
    assert cursor.tolist() == [0, 3, 0]


# -- on a card


@needs_gpu
@pytest.mark.gpu
class TestOnACard:
    @pytest.fixture(autouse=True)
    def _library(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        if not cuda.LIBRARY.exists():
            monkeypatch.setattr(cuda, "LIBRARY", request.getfixturevalue("compiled")[0])

    def test_may_run(self) -> None:
        assert cuda.why_not("class_topk", torch.device("cuda")) is None

    def test_nothing_waits_for_the_device(self) -> None:
        inputs = self.pixels(33_620)
        bank = self.bank()
        teacher, student = (torch.randn(5000, device="cuda") for _ in range(2))
        decay = torch.tensor(0.9, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            index, _ = cuda.class_topk(*inputs, 256, 21, None)
            cuda.queue_push_(*bank, torch.randn(33_620, 64, device="cuda"), index)
            cuda_ema_([teacher, teacher[::2]], [student, student[::2]], decay)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_captured_graph_reads_a_new_decay(self) -> None:
        teacher, student = torch.ones(5000, device="cuda"), torch.zeros(5000, device="cuda")
        decay = torch.tensor(0.5, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            cuda_ema_([teacher], [student], decay)
        graph.replay()
        assert (teacher == 0.5).all()
        decay.fill_(0.25)
        graph.replay()
        assert (teacher == 0.125).all()

    def test_a_refused_launch_is_told(self) -> None:
        with pytest.raises(RuntimeError, match=r"class_topk: .* CUDA error"):
            cuda._launch("class_topk", torch.device("cuda", 0), *[0] * 13)  # an empty grid

    def test_captured_graph_selects_and_pushes(self) -> None:
        confidence, label = self.pixels(33_620)
        features = torch.randn(33_620, 64, device="cuda")
        bank, expected = self.bank(), self.bank()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            index, _ = cuda.class_topk(confidence, label, 50, 21, None)
            cuda.queue_push_(*bank, features, index)
        for seed in range(3):
            new_confidence, new_label = self.pixels(33_620, seed)
            confidence.copy_(new_confidence)
            label.copy_(new_label)
            graph.replay()
            chosen, _ = reference.class_topk(new_confidence, new_label, 50, 21)
            reference.queue_push_(*expected, features, chosen)
            torch.testing.assert_close(bank, expected)

    def test_runs_on_the_current_stream(self) -> None:
        side = torch.cuda.Stream()
        teacher, student = torch.ones(5000, device="cuda"), torch.zeros(5000, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            student.fill_(2)
            cuda_ema_([teacher], [student], 0.5)
        side.synchronize()
        assert (teacher == 1.5).all()

    def test_the_papers_sizes(self) -> None:
        for pixels in (8_580, 33_620, 131_220):
            assert_same_choice(*self.pixels(pixels), 256, 21)

    @staticmethod
    def pixels(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator("cuda").manual_seed(seed)
        confidence = torch.rand(count, device="cuda", generator=generator)
        return confidence, torch.randint(0, 22, (count,), device="cuda", generator=generator)

    @staticmethod
    def bank() -> list[Tensor]:
        held = torch.zeros(21, dtype=torch.int64, device="cuda")
        return [torch.zeros(21, 128, 64, device="cuda"), held, held.clone()]
