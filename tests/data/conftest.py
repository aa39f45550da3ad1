from pathlib import Path

import pytest
from synthetic import make_cache, write_dataset


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of ten patients, `tiny/case0` to `tiny/case9`; nobody may write into it."""
    folder = tmp_path_factory.mktemp("prepared")
    return make_cache(write_dataset(folder / "set", 10), folder / "cache")
