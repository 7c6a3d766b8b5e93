"""Files: a compressed tree on disk, and back."""

from jaxcomp.storage.checkpoints import read_checkpoint as read_checkpoint
from jaxcomp.storage.checkpoints import write_checkpoint as write_checkpoint
from jaxcomp.storage.container import load as load
from jaxcomp.storage.container import save as save
