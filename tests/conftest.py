"""What every test runs under: no network, nothing of the user's touched, fixed seeds, deprecations as errors."""

import logging
import os
import tempfile

import hypothesis
import pytest
import torch

# Read when Transformers is imported, which this file therefore does not do; subprocesses of tests inherit them.
_modules_cache = tempfile.TemporaryDirectory(prefix="infini_llama_hf_modules_")
os.environ["HF_MODULES_CACHE"] = _modules_cache.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny tensors: a second thread costs more than it brings, by an order of magnitude on a busy machine.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


class _TorchRandom:
    """torch's generator in the shape of `random.Random`, so that Hypothesis seeds it for each example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_torch_random = _TorchRandom()  # Hypothesis keeps a weak reference only
hypothesis.register_random(_torch_random)
# The same examples in every run; no deadline, because the first example of a shape pays for torch's warm-up.
hypothesis.settings.register_profile("deterministic", derandomize=True, deadline=None)
hypothesis.settings.load_profile("deterministic")


# `cache` from Transformers 5.24 on. The old name is the one that all supported versions know, until 5.40 at least.
RENAMED = "`past_key_values`"


class _DeprecationIsAnError(logging.Handler):
    """Transformers announces half of its deprecations in its log, where `filterwarnings` does not reach."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" in message.lower() and RENAMED not in message:
            raise FutureWarning(message)


logging.getLogger("transformers").addHandler(_DeprecationIsAnError(level=logging.WARNING))


def pytest_unconfigure() -> None:
    _modules_cache.cleanup()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whichever tests ran before it."""
    torch.manual_seed(0)
