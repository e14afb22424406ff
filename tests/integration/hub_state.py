"""What the Hub of the tests holds: repositories, branches, commits, and what it was asked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


@dataclass
class Repo:
    """A repository of a model or a Space.

    Attributes:
        private: as it was created.
        sdk: of a Space; None for a model.
        branches: the id of each branch's last commit.
        commits: each commit's files by path.
        messages: each commit's title.
    """

    private: bool = False
    sdk: str | None = None
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, message: str, files: dict[str, bytes]) -> str:
        digest = hashlib.sha1(f"{len(self.commits)}{message}".encode(), usedforsecurity=False)
        oid = digest.hexdigest()
        self.commits[oid] = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        self.messages[oid] = message
        self.branches[branch] = oid
        return oid


class Hub:
    """What the server holds and has been asked.

    Attributes:
        url: of the server.
        storage: of the server as another host, to which downloads of LFS files are redirected.
        repos: by their id; a Space's begins with ``spaces/``.
        requests: method, path and ``Range`` of every request.
        cuts: number of bytes after which the next downloads of a file stop, by the end of its path; each holds once.
    """

    def __init__(self) -> None:
        self.url = self.storage = ""
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.cuts: dict[str, list[int]] = {}

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.branches.get(revision, revision)]

    def ranges(self) -> list[str]:
        return [range_ for _, _, range_ in self.requests if range_ is not None]

    def cut(self, name: str) -> int | None:
        for ending, lengths in self.cuts.items():
            if name.endswith(ending) and lengths:
                return lengths.pop(0)
        return None
