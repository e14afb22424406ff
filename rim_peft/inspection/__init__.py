"""See a model think: what it holds after each block, as one document with four renderers."""

from rim_peft.inspection.document import Inspection
from rim_peft.inspection.inspecting import Options, inspect_questions
from rim_peft.inspection.page import render_page
from rim_peft.inspection.picture import render_picture
from rim_peft.inspection.signals import render_text

__all__ = ["Inspection", "Options", "inspect_questions", "render_page", "render_picture", "render_text"]
