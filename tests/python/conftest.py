import pytest

from ranks import Ranks


@pytest.fixture(scope="session")
def ranks():
    everyone = Ranks()
    yield everyone
    everyone.stop()
