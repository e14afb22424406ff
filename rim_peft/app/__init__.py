"""A page to play with an adapter, on this machine or as a Space."""

from rim_peft.app.page import build_page, launch, serve
from rim_peft.app.playground import Playground, Session, Turn
from rim_peft.app.space import push_space, space_files

__all__ = ["Playground", "Session", "Turn", "build_page", "launch", "push_space", "serve", "space_files"]
