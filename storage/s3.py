"""S3 and what speaks like it (R2, MinIO), through boto3: one client for all, in threads of its own.

boto3 blocks, so its calls run in a bounded pool that nothing else uses: a storage that hangs costs those threads and no
others. Every call has the deadlines of its connection, and its waiter one more, for a pool that is all hung up.
Checksums that only Amazon knows are sent where they are required, and links are made by PUT and GET alone: R2 knows no
POST form.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from storage.base import NoSuchKeyError, StorageUnavailableError, bounded, checked_key

log = logging.getLogger(__name__)

T = TypeVar("T")
_THREADS = 16
_SIGNING_THREADS = 2
_CONNECT_SECONDS = 3
_READ_SECONDS = 15
_CALL_SECONDS = 30.0
_PIECE_BYTES = 256 * 1024
# All parts but the last are of one size, as R2 wants it, and above the 5 MiB that S3 does.
_PART_BYTES = 8 * 1024 * 1024
# What the bytes are is said by the link that they are read with.
_STORED_TYPE = "application/octet-stream"


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Settings:
    """Where and as whom. `endpoint` None: Amazon's of the region; R2's region is `auto`."""

    bucket: str
    prefix: str
    endpoint: str | None
    region: str
    access_key_id: str
    secret_access_key: str = field(repr=False)


class S3Storage:
    """Objects of one bucket under one prefix. Makes no connection before it is used."""

    def __init__(self, settings: S3Settings) -> None:
        self._bucket = settings.bucket
        self._prefix = settings.prefix
        config = Config(
            signature_version="s3v4",
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=_READ_SECONDS,
            max_pool_connections=_THREADS,
            retries={"total_max_attempts": 2, "mode": "standard"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "auto" if settings.endpoint is None else "path"},
        )
        self._client: Any = boto3.session.Session(
            aws_access_key_id=settings.access_key_id,
            aws_secret_access_key=settings.secret_access_key,
            region_name=settings.region,
        ).client("s3", endpoint_url=settings.endpoint, config=config)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="s3")
        # Signing needs no storage: links are made though all the other threads hang on one.
        self._signing = ThreadPoolExecutor(_SIGNING_THREADS, thread_name_prefix="s3 signing")

    async def put(self, key: str, chunks: AsyncIterable[bytes], *, max_bytes: int) -> int:
        """See `Storage.put`. In parts of 8 MiB, of which an upload holds one."""
        where = self._where(key)
        size, part, number = 0, bytearray(), 0
        upload: str | None = None
        sent: list[dict[str, Any]] = []

        async def send(body: bytes) -> None:
            nonlocal upload, number
            if upload is None:
                upload = (await self._call("create_multipart_upload", **where, ContentType=_STORED_TYPE))["UploadId"]
            number += 1
            answer = await self._call("upload_part", **where, UploadId=upload, PartNumber=number, Body=body)
            sent.append({"PartNumber": number, "ETag": answer["ETag"]})

        try:
            async for chunk in bounded(chunks, max_bytes):
                size += len(chunk)
                part += chunk
                while len(part) > _PART_BYTES:
                    await send(bytes(part[:_PART_BYTES]))
                    del part[:_PART_BYTES]
            if upload is None:
                await self._call("put_object", **where, Body=bytes(part), ContentType=_STORED_TYPE)
            else:
                await send(bytes(part))
                await self._call("complete_multipart_upload", **where, UploadId=upload, MultipartUpload={"Parts": sent})
        except BaseException:
            if upload is not None:
                # What a lost process leaves of an upload, a rule of the bucket must end (docs/attachments.md).
                with suppress(StorageUnavailableError, NoSuchKeyError):
                    await asyncio.shield(self._call("abort_multipart_upload", **where, UploadId=upload))
            raise
        return size

    async def read(self, key: str) -> AsyncGenerator[bytes, None]:
        """See `Storage.read`."""
        body = (await self._call("get_object", **self._where(key)))["Body"]
        try:
            while piece := await self._run(body.read, _PIECE_BYTES):
                yield piece
        finally:
            body.close()

    async def size(self, key: str) -> int | None:
        """See `Storage.size`."""
        try:
            return int((await self._call("head_object", **self._where(key)))["ContentLength"])
        except NoSuchKeyError:
            return None

    async def copy(self, source: str, target: str) -> None:
        """See `Storage.copy`."""
        await self._call(
            "copy_object",
            **self._where(target),
            CopySource=self._where(source),
            MetadataDirective="REPLACE",
            ContentType=_STORED_TYPE,
        )

    async def delete(self, key: str) -> None:
        """See `Storage.delete`."""
        with suppress(NoSuchKeyError):
            await self._call("delete_object", **self._where(key))

    async def signed_get(self, key: str, *, content_type: str, disposition: str, seconds: int) -> str:
        """See `Storage.signed_get`."""
        asked = self._where(key) | {"ResponseContentType": content_type, "ResponseContentDisposition": disposition}
        return await self._signed("get_object", asked, seconds)

    async def signed_put(self, key: str, *, content_type: str, size: int, seconds: int) -> str:
        """See `Storage.signed_put`."""
        return await self._signed(
            "put_object", self._where(key) | {"ContentType": content_type, "ContentLength": size}, seconds
        )

    async def close(self) -> None:
        """See `Storage.close`."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._signing.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._client.close)

    def _where(self, key: str) -> dict[str, Any]:
        return {"Bucket": self._bucket, "Key": self._prefix + checked_key(key)}

    async def _signed(self, operation: str, asked: dict[str, Any], seconds: int) -> str:
        # Local work of a third of a millisecond: in a thread for the sake of pages of a hundred.
        def sign() -> str:
            return str(self._client.generate_presigned_url(operation, Params=asked, ExpiresIn=seconds))

        return await self._run(sign, pool=self._signing)

    async def _call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        def call() -> dict[str, Any]:
            answer: dict[str, Any] = getattr(self._client, operation)(**arguments)
            return answer

        return await self._run(call)

    async def _run(self, work: Callable[..., T], *arguments: Any, pool: ThreadPoolExecutor | None = None) -> T:
        """The result of blocking work, its failures as ours."""
        try:
            async with asyncio.timeout(_CALL_SECONDS):
                return await asyncio.get_running_loop().run_in_executor(pool or self._pool, work, *arguments)
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in ("NoSuchKey", "404", "NotFound"):
                raise NoSuchKeyError from error
            log.warning("the file storage refused: %s", code)
            raise StorageUnavailableError(code) from error
        except (BotoCoreError, OSError, RuntimeError) as error:
            # RuntimeError: the pool is closed.
            log.warning("the file storage is out of reach: %s", type(error).__name__)
            raise StorageUnavailableError(type(error).__name__) from error
