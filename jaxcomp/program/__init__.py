"""Programs: a traced function, walked; never a model, patched."""

from jaxcomp.program.axes import Rule as Rule
from jaxcomp.program.axes import freeze as freeze
from jaxcomp.program.count import Count as Count
from jaxcomp.program.count import count as count
from jaxcomp.program.coupling import Frozen as Frozen
from jaxcomp.program.coupling import Groups as Groups
from jaxcomp.program.coupling import coupled_groups as coupled_groups
from jaxcomp.program.fake import fake_quantized as fake_quantized
from jaxcomp.program.rules import RULES as RULES
from jaxcomp.program.shrink import Shrunk as Shrunk
from jaxcomp.program.shrink import cut as cut
from jaxcomp.program.shrink import shrink as shrink
from jaxcomp.program.views import View as View
from jaxcomp.program.views import index_map as index_map
from jaxcomp.program.walk import Program as Program
from jaxcomp.program.walk import trace as trace
from jaxcomp.program.walk import walk as walk
