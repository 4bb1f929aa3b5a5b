from ..project.conftest import start as start
