"""Files: a compressed tree on disk, and back."""

from jaxcomp.storage.container import load as load
from jaxcomp.storage.container import save as save
