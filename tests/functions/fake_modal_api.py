"""Modal's API on loopback, as far as a deployment asks it: the real SDK's calls, kept, and answers that satisfy it."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import grpclib
from google.protobuf.empty_pb2 import Empty
from grpclib.server import Server
from modal_proto import api_grpc, api_pb2

Answer = Callable[["FakeModalApi", Any], Any]


def _jwt() -> str:
    """Return an unsigned token that is good for an hour."""
    parts = ({"alg": "none"}, {"exp": int(time.time()) + 3600})
    return ".".join([*(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts), ""])


@dataclass
class FakeModalApi:
    """What was asked, by the name of the call, in order."""

    calls: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    url: str = ""
    _ids: Iterator[int] = field(default_factory=count)

    def new_id(self, kind: str) -> str:
        return f"{kind}-{next(self._ids):022d}"

    def functions(self) -> dict[str, Any]:
        """Return what each function was created as, GPU choices included."""
        return {_data(request).function_name: request for request in self.calls["FunctionCreate"]}


def _data(request: Any) -> Any:
    return request.function if request.HasField("function") else request.function_data


def _function(api: FakeModalApi, request: Any) -> Any:
    """Return the function as it was asked for, which the SDK reads as what was made."""
    response = api_pb2.FunctionCreateResponse(function_id=request.existing_function_id)
    if request.HasField("function"):
        response.function_data.function_name = request.function.function_name
        response.function_data.ranked_functions.add().function.CopyFrom(request.function)
    else:
        response.function_data.CopyFrom(request.function_data)
    response.handle_metadata.CopyFrom(_metadata(_data(request)))
    return response


def _metadata(data: Any) -> Any:
    return api_pb2.FunctionHandleMetadata(
        function_name=data.function_name,
        function_type=data.function_type,
        is_method=False,
        use_method_name="",
        method_handle_metadata={
            name: api_pb2.FunctionHandleMetadata(
                function_name=definition.function_name, function_type=definition.function_type, is_method=True
            )
            for name, definition in data.method_definitions.items()
        },
    )


ANSWERS: dict[str, Answer] = {
    "ClientHello": lambda api, _: api_pb2.ClientHelloResponse(),
    "AuthTokenGet": lambda api, _: api_pb2.AuthTokenGetResponse(token=_jwt()),
    "EnvironmentGetOrCreate": lambda api, _: api_pb2.EnvironmentGetOrCreateResponse(
        environment_id=api.new_id("en"),
        metadata=api_pb2.EnvironmentMetadata(
            name="main", settings=api_pb2.EnvironmentSettings(image_builder_version="2025.06")
        ),
    ),
    "AppGetByDeploymentName": lambda api, _: api_pb2.AppGetByDeploymentNameResponse(),
    "AppGetOrCreate": lambda api, _: api_pb2.AppGetOrCreateResponse(app_id=api.new_id("ap")),
    "AppCreate": lambda api, _: api_pb2.AppCreateResponse(app_id=api.new_id("ap"), app_page_url="http://127.0.0.1/app"),
    "AppPublish": lambda api, _: api_pb2.AppPublishResponse(url="http://127.0.0.1/app"),
    "AppHeartbeat": lambda api, _: Empty(),
    "AppClientDisconnect": lambda api, _: Empty(),
    "MountBatchedCheckExistence": lambda api, _: api_pb2.MountBatchedCheckExistenceResponse(),
    "MountPutFile": lambda api, _: api_pb2.MountPutFileResponse(exists=True),
    "MountGetOrCreate": lambda api, _: api_pb2.MountGetOrCreateResponse(
        mount_id=api.new_id("mo"), handle_metadata=api_pb2.MountHandleMetadata(content_checksum_sha256_hex="0" * 64)
    ),
    "VolumeGetOrCreate": lambda api, _: api_pb2.VolumeGetOrCreateResponse(
        volume_id=api.new_id("vo"), version=api_pb2.VOLUME_FS_VERSION_V2
    ),
    "SecretGetOrCreate": lambda api, _: api_pb2.SecretGetOrCreateResponse(secret_id=api.new_id("st")),
    "ImageGetOrCreate": lambda api, _: api_pb2.ImageGetOrCreateResponse(
        image_id=api.new_id("im"),
        result=api_pb2.GenericResult(status=api_pb2.GenericResult.GENERIC_STATUS_SUCCESS),
        metadata=api_pb2.ImageMetadata(),
    ),
    "FunctionPrecreate": lambda api, request: api_pb2.FunctionPrecreateResponse(function_id=api.new_id("fu")),
    "FunctionCreate": _function,
    "ClassCreate": lambda api, _: api_pb2.ClassCreateResponse(class_id=api.new_id("cs")),
}


def _service(api: FakeModalApi) -> Any:
    """Return the whole service; what a deployment has no business asking is refused by its name."""

    def handler(name: str) -> Any:
        async def handle(self: Any, stream: Any) -> None:
            request = await stream.recv_message()
            api.calls[name].append(request)
            if name not in ANSWERS:
                raise grpclib.GRPCError(grpclib.const.Status.UNIMPLEMENTED, name)
            await stream.send_message(ANSWERS[name](api, request))

        return handle

    names = api_grpc.ModalClientBase.__abstractmethods__
    return type("Service", (api_grpc.ModalClientBase,), {name: handler(name) for name in names})()


@contextmanager
def fake_modal_api() -> Iterator[FakeModalApi]:
    """Serve the fake on a free port of loopback, on a thread of its own."""
    api = FakeModalApi()
    ready: Future[Callable[[], object]] = Future()

    async def serve() -> None:
        server = Server([_service(api)])
        await server.start("127.0.0.1", 0)
        listening: Any = server._server
        api.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        loop = asyncio.get_running_loop()
        ready.set_result(partial(loop.call_soon_threadsafe, server.close))
        await server.wait_closed()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    close = ready.result()
    try:
        yield api
    finally:
        close()
        thread.join()
