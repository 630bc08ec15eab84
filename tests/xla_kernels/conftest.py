import pytest

from xla_kernels import available_implementations, library


def _levels():
    levels = available_implementations()["simd_levels"]
    return [name for name, runs in levels.items() if runs is True]


LEVELS = _levels()


@pytest.fixture
def simd(request):
    """Force an instruction set for one test."""
    before = library.simd_level()
    library.set_simd_level(request.param)
    yield request.param
    library.set_simd_level(before)


def pytest_generate_tests(metafunc):
    if "simd" in metafunc.fixturenames:
        metafunc.parametrize("simd", LEVELS, indirect=True)


@pytest.fixture
def compiled():
    """Skip, visibly, where the compiled kernels are not built."""
    if not LEVELS:
        pytest.skip(f"no compiled kernels: {library.load().reason}")
