"""Two tasks at a time: the same results in the same order, with half the cores for each thread."""

import threading

import pytest
import torch

from ghibli.diffusion.samplers import Cell, sample
from ghibli.evaluation.samples import two_at_a_time
from ghibli.models.base import BaseModel

CPU = torch.device("cpu")


@pytest.fixture
def two_threads() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_samples_are_those_of_one_thread(two_threads: None, base: BaseModel) -> None:
    """Bit for bit as torch gives them in the main thread with half the threads."""

    def drawn(seed: int) -> torch.Tensor:
        options = {"num_inference_steps": 3, "resolution": 64}
        return sample(base, ["a red train by a lake"], Cell("ddpm", 7.5), seeds=[seed], **options)

    found = list(two_at_a_time([lambda seed=seed: drawn(seed) for seed in range(6)], CPU))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert all(torch.equal(image, drawn(seed)) for seed, image in enumerate(found))


def test_exactly_two_run_at_a_time(two_threads: None) -> None:
    both = threading.Barrier(2, timeout=20)  # breaks unless two tasks meet

    def task(number: int) -> tuple[int, int]:
        both.wait()
        return number, torch.get_num_threads()

    assert list(two_at_a_time([lambda n=n: task(n) for n in range(6)], CPU)) == [(n, 1) for n in range(6)]


def test_an_error_ends_it_and_restores_the_threads(two_threads: None) -> None:
    started = []

    def task(number: int) -> int:
        started.append(number)
        return 1 // (number - 1)

    with pytest.raises(ZeroDivisionError):
        list(two_at_a_time([lambda n=n: task(n) for n in range(50)], CPU))
    assert torch.get_num_threads() == 2
    assert len(started) < 10


def test_one_core_or_a_gpu_runs_one_at_a_time() -> None:
    here = threading.get_ident()
    tasks = [threading.get_ident] * 3
    assert list(two_at_a_time(tasks, torch.device("cuda"))) == [here] * 3
