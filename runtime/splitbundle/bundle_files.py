"""The half of ``Bundle`` that computes nothing: verify, compare, plan and take apart, by the documents and files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

from splitbundle.backends import registry
from splitbundle.errors import BundleError, MissingExtra, Problem, quoted, wrong_argument
from splitbundle.storage.documents import telling_of_replacement
from splitbundle.storage.drafts import telling_of_draft
from splitbundle.storage.files import Progress
from splitbundle.storage.reader import BundleReader

if TYPE_CHECKING:
    from typing_extensions import Self

    from splitbundle.comparison.records import Comparison
    from splitbundle.planning.plan import Plan
    from splitbundle.sharing.archive import Archive
    from splitbundle.sharing.signatures import Signature
    from splitbundle.text.huggingface import TextTokenizer
    from splitbundle.verification.verify import Verification


class BundleFiles(BundleReader):
    """A bundle as files. The modules that a method needs are imported at its first call."""

    def verify(
        self,
        shard: str | None = None,
        *,
        exact: bool = False,
        whole: bool = False,
        progress: Progress | None = None,
    ) -> Verification:
        """Check the size, digest and header of every file, or of the files of one ``shard``.

        A listed file that is missing is a problem. The exception is a partial bundle, as ``extract`` makes it: some
        shards are whole, and nothing is there of the others. Then the files that are there are checked.

        Args:
            shard: the only shard to check; by default the whole bundle.
            exact: whether a file that the manifest doesn't list is a problem too.
            whole: whether a partial bundle is a problem, too.
            progress: called with the name of the work, the bytes that are done, and the total in bytes.

        Returns:
            The checked files with their size, the files that the manifest doesn't list, and those that a partial bundle
            lacks.

        Raises:
            BundleError: every problem of every file.
        """
        # Imported here, as it loads the rules for graphs and tokenizers, which computing doesn't need.
        from splitbundle.verification.verify import verify

        with self._told(shard):
            return verify(self, shard, exact=exact, whole=whole, progress=progress)

    def tokenizer(self) -> TextTokenizer:
        """Load the bundle's tokenizer, which turns text and chats into token ids, and ids into text.

        Loading takes up to seconds for a large vocabulary, so keep the result. Threads may share it. It needs the
        libraries ``tokenizers`` and, for chats, ``jinja2``: the extra ``text``.

        Raises:
            MissingExtra: ``tokenizers`` isn't installed.
            BundleError: ``text.none`` for a bundle without a tokenizer; ``file.*``, ``json.*``, ``text.*`` for one that
                can't be used.
        """
        if self.manifest.text.tokenizer is None:
            hint = "Use token ids, or convert the model with its tokenizer"
            expected, got = "a tokenizer", "a bundle without one"
            raise BundleError(Problem(code="text.none", file=str(self.path), expected=expected, got=got, hint=hint))
        try:
            from splitbundle.text.huggingface import TextTokenizer
        except ModuleNotFoundError as error:
            if error.name != "tokenizers":
                raise
            raise MissingExtra.of("tokenizers", "text", "turn text into token ids, and ids into text") from None
        with self._told():
            return TextTokenizer(self)

    def check_texts(self) -> int:
        """Hold the tokenizer against the golden texts of the bundle, and the chat template against its golden chats.

        Returns:
            The number of golden texts and chats that were checked: 0 for a bundle without any. Without ``jinja2``, no
            chat is checked.

        Raises:
            MissingExtra: ``tokenizers`` isn't installed.
            BundleError: ``text.ids`` for other ids or another text; as for ``tokenizer``.
        """
        if self.manifest.model.text_file is None:
            return 0
        tokenizer = self.tokenizer()
        from importlib.util import find_spec

        from splitbundle.text.golden import check

        return check(tokenizer, chats=find_spec("jinja2") is not None)

    def diff(
        self, other: BundleFiles, *, only: Iterable[str] | None = None, progress: Progress | None = None
    ) -> Comparison:
        """Compare this bundle, A, with another one, B.

        The documents are compared, with the digests that they list. Weights whose digests differ are mapped, their
        headers are checked, and their values are compared with torch, if it is installed. ``Bundle.verify`` checks
        that the files are those that a manifest lists.

        Args:
            other: the bundle B.
            only: the aspects to compare, of ``"model"``, ``"cuts"``, ``"facts"``, ``"weights"``, ``"tokenizer"``,
                ``"vectors"`` and ``"files"``; by default all.
            progress: called with the name of the work, the amount that is done, and the total amount.

        Returns:
            The differences. ``differs`` says whether there are any, and ``as_json`` returns them for JSON.

        Raises:
            BundleError: ``input.value`` for an unknown aspect, and for another object than a bundle; ``file.*`` and
                ``weights.*`` for a weight file with another size or header.
        """
        from splitbundle.comparison import documents, records

        if not isinstance(other, BundleFiles):
            raise wrong_argument("other", "a bundle, as splitbundle.open returns it", quoted(other))
        wanted = records.ASPECTS if only is None else only
        with self._told(), other._told():
            return documents.compare(self, other, only=wanted, measure=registry.measure, progress=progress)

    def plan(
        self,
        *,
        equal: int | None = None,
        max_shard_size: int | None = None,
        machines: Sequence[int] | None = None,
        context: int | None = None,
        batch: int = 1,
        dtype: str | None = None,
    ) -> Plan:
        """Tell the costs of each shard, and propose other cuts. This reads the documents alone, and no weight.

        At most one of ``equal``, ``max_shard_size`` and ``machines`` chooses the cuts. Without one, none are proposed.

        Args:
            equal: the number of shards; the largest one gets as few bytes as possible.
            max_shard_size: the largest size of a shard's files in bytes; there are as few shards as possible.
            machines: the memory of each machine in bytes, one shard for each in this order. The weights and the cache
                must fit, and the largest use relative to the machine's memory is as small as possible.
            context: the number of tokens of a row; by default 4096, or the context of a model with a shorter one.
            batch: the number of rows.
            dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"`` to compute in; by default the stored dtype.

        Returns:
            The costs of the present shards, the proposed cuts, and the costs of the shards between them.

        Raises:
            BundleError: ``usage.cut`` and ``usage.size`` for cuts that can't be made; ``input.value``,
                ``input.dtype``.
        """
        from splitbundle.planning.plan import make_plan

        return make_plan(
            self.manifest,
            self.architecture,
            equal=equal,
            max_shard_size=max_shard_size,
            machines=machines,
            context=context,
            batch=batch,
            dtype=dtype,
        )

    def paths(self, *shards: str, vectors: bool = False, text: bool = False) -> list[str]:
        """Return the paths of the files that some shards need, relative to the bundle's directory.

        These are the documents, the weight files, the graphs and the signatures. A copy of these files is a partial
        bundle of the same id.

        Args:
            shards: the names of the shards.
            vectors: whether to include the golden vectors, which ``run_vectors`` needs.
            text: whether to include the tokenizer.

        Raises:
            BundleError: ``stage.name``; ``input.value`` without a name.
        """
        from splitbundle.partial.shard_files import UNLISTED, listed_files
        from splitbundle.storage.signature_files import signature_files

        listed = listed_files(self, shards, vectors=vectors, text=text)
        return [*UNLISTED, *listed, *signature_files(self.path)]

    def extract(
        self,
        path: str | os.PathLike[str],
        *shards: str,
        vectors: bool = True,
        text: bool = False,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Self:
        """Write a partial bundle with some shards. Its files, its signatures and its bundle id are unchanged.

        Each copy is verified. The new bundle appears complete, or not at all.

        Args:
            path: the directory of the new bundle.
            shards: the names of the shards.
            vectors: whether to include the golden vectors, which ``run_vectors`` needs.
            text: whether to include the tokenizer.
            force: whether to replace an existing bundle.
            progress: called with the name of the work, the amount that is done, and the total amount.

        Returns:
            The new bundle, opened.

        Raises:
            BundleError: ``stage.name``; ``input.value`` without a name; ``output.*``; ``file.*``.
        """
        from splitbundle.partial.extracting import extract

        with self._told():
            return extract(self, path, shards, vectors=vectors, text=text, force=force, progress=progress)

    def pack(self, path: str | os.PathLike[str], *, force: bool = False, progress: Progress | None = None) -> Archive:
        """Write the bundle into one tar archive, without compression. ``splitbundle.unpack`` reads it.

        Each file that is there is hashed. The signatures are taken along. Bundles of one id with the same files
        give the same bytes. A partial bundle may be packed, too. The archive appears complete, or not at all.

        Args:
            path: the archive.
            force: whether to replace an existing tar archive.
            progress: called with the name of the work, the bytes that are done, and the total in bytes.

        Returns:
            The path and the size of the archive, and the files that are in it.

        Raises:
            BundleError: ``file.*``; ``output.*``; ``archive.member`` for more files than an archive may have.
        """
        from splitbundle.sharing.archive import pack

        with self._told():
            return pack(self, path, force=force, progress=progress)

    def sign(
        self,
        key: str | os.PathLike[str],
        *,
        output: str | os.PathLike[str] | None = None,
        name: str | None = None,
        password: str | Callable[[], str | None] | None = None,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Signature:
        """Sign the bundle, and so all files that its manifest lists. It needs the library ``cryptography``.

        The digests of the files that are there are checked first. The signature has the form of OpenSSF model signing,
        and lies in the bundle's directory, in ``signatures/``. The bundle id stays.

        Args:
            key: a private key in PEM: Ed25519, or ECDSA on P-256, P-384 or P-521.
            output: a file to write the signature to, in place of the bundle's directory.
            name: the name of the signature in the bundle; by default 16 digits of the digest of the public key.
            password: the passphrase of an encrypted key, or a function that returns it if it is needed.
            force: whether to replace an existing signature of this name.
            progress: called with the name of the work, the bytes that are done, and the total in bytes.

        Returns:
            The path of the signature, the digest of the public key, and the number of files that are signed.

        Raises:
            MissingExtra: ``cryptography`` isn't installed.
            BundleError: ``signature.key``; ``file.*`` and ``sums.mismatch`` for a bundle that isn't as its manifest
                says; ``output.*``; ``input.value`` for another name.
        """
        with self._told():
            made: Signature = _signatures().sign(
                self, key, output=output, name=name, password=password, force=force, progress=progress
            )
        return made

    def verify_signature(
        self,
        public_keys: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        signature: str | os.PathLike[str] | None = None,
    ) -> Signature:
        """Check that one of some keys signed this bundle. It needs the library ``cryptography``.

        This proves the manifest, and so the digests that it lists. ``verify`` compares the files with them, also those
        of a part of the bundle.

        Args:
            public_keys: public keys in PEM, or one. A signature by any of them suffices.
            signature: the file of the signature; by default those in the bundle's directory.

        Returns:
            The signature that holds, and the key that proved it.

        Raises:
            MissingExtra: ``cryptography`` isn't installed.
            VerificationError: ``signature.missing``, ``signature.invalid``, ``signature.files``, ``json.*`` and
                ``field.*`` of every signature that was looked at.
            BundleError: ``signature.key`` for a file that isn't a public key; ``file.*``.
        """
        with self._told():
            found: Signature = _signatures().verify(self, public_keys, signature=signature)
        return found

    @contextmanager
    def _told(self, shard: str | None = None) -> Iterator[None]:
        """If the block fails, say so where the bundle was replaced, and where an absent file can be pulled from."""
        try:
            with telling_of_replacement(self.path, self.id), telling_of_draft(self.path, self.manifest.producer):
                yield
        except BundleError as error:
            if not any(code.startswith("file.") for code in error.codes):
                raise
            from splitbundle.sharing.origins import with_origin  # imported here, as it loads the cache

            told = with_origin(self, error, shard)
            if told is error:
                raise
            raise told from error


def _signatures() -> ModuleType:
    """Return the module that signs bundles.

    Raises:
        MissingExtra: ``cryptography`` isn't installed.
    """
    try:
        from splitbundle.sharing import signatures
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "cryptography":
            raise
        raise MissingExtra.of("cryptography", "share", "sign a bundle, and to check a signature") from None
    return signatures
