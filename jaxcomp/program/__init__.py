"""Programs: a traced function, walked; never a model, patched."""

from jaxcomp.program.count import Count as Count
from jaxcomp.program.count import count as count
from jaxcomp.program.fake import fake_quantized as fake_quantized
from jaxcomp.program.views import View as View
from jaxcomp.program.views import index_map as index_map
from jaxcomp.program.walk import Program as Program
from jaxcomp.program.walk import trace as trace
from jaxcomp.program.walk import walk as walk
