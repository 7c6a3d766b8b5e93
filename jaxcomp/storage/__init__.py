"""Files: a compressed tree on disk, and back."""

from jaxcomp.storage.checkpoints import read_checkpoint as read_checkpoint
from jaxcomp.storage.checkpoints import write_checkpoint as write_checkpoint
from jaxcomp.storage.container import load as load
from jaxcomp.storage.container import open_file as open_file
from jaxcomp.storage.container import read_notes as read_notes
from jaxcomp.storage.container import save as save
from jaxcomp.storage.file import FileFault as FileFault
from jaxcomp.storage.restore import restore_checkpoint as restore_checkpoint
