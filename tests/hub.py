"""A hub of one repository, `owner/model`, for tests; downloads land in a cache as the hub's client lays it out."""

import fnmatch
import shutil
from types import SimpleNamespace

import huggingface_hub
from huggingface_hub.errors import OfflineModeIsEnabled

ID = "owner/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves the files of `source`, a folder; `downloaded` holds the names of those that were fetched."""

    def __init__(self, monkeypatch, source, cache) -> None:
        self.source, self.cache, self.downloaded, self.online = source, cache, [], True
        self.repository = cache / "models--owner--model"
        self.snapshot = self.repository / "snapshots" / COMMIT
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", self._model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self._download)

    def put_into_cache(self, *patterns) -> None:
        """Leave files in the cache, as another program's download does: blobs, links to them and the branch."""
        (self.repository / "refs").mkdir(parents=True, exist_ok=True)
        (self.repository / "refs" / "main").write_text(COMMIT)
        for name in self._names(patterns):
            blob, link = self.repository / "blobs" / name.replace("/", "-"), self.snapshot / name
            for path in (blob, link):
                path.parent.mkdir(parents=True, exist_ok=True)
            if not link.exists():
                shutil.copy(self.source / name, blob)
                link.symlink_to(blob)
                self.downloaded.append(name)

    def _names(self, patterns):
        names = [path.relative_to(self.source).as_posix() for path in self.source.rglob("*") if path.is_file()]
        return sorted(name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns))

    def _model_info(self, repo_id, *, revision=None):
        if not self.online:
            raise OfflineModeIsEnabled("the hub can't be asked\nand more lines")
        assert repo_id == ID and revision in (None, "main", COMMIT)
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in self._names("*")])

    def _download(self, repo_id, *, revision=None, allow_patterns):
        assert self.online and repo_id == ID and revision in (None, "main", COMMIT)
        self.put_into_cache(*allow_patterns)
        return str(self.snapshot)
