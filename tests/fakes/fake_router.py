"""A router that answers from a script, for tests of what calls it."""

from __future__ import annotations

import asyncio

from asd.errors import Unauthenticated
from asd.v1 import cascade_pb2, cascade_pb2_grpc, common_pb2
from services.common.server import ServerOptions, ServiceRegistration, start_server

WORDS = ("Forty", "-two", ".")
TEXT = "Forty-two."


def answer(text=TEXT, finish=common_pb2.FINISH_REASON_EOS, **fields):
    """Return the answer of a stage that verified another one's draft."""
    drafted = common_pb2.Usage(prompt_tokens=7, completion_tokens=3)
    verified = common_pb2.Usage(
        prompt_tokens=7,
        cached_prompt_tokens=2,
        completion_tokens=3,
        proposed_tokens=3,
        accepted_tokens=2,
    )
    records = [
        cascade_pb2.StageRecord(
            stage="small",
            action=common_pb2.STAGE_ACTION_GENERATE,
            usage=drafted,
            cost=1.0,
            model="s-135m",
            text="a secret draft",
        ),
        cascade_pb2.StageRecord(
            stage="large",
            stage_index=1,
            action=common_pb2.STAGE_ACTION_VERIFY,
            usage=verified,
            cost=2.5,
            p_correct=0.75,
            model="l-70b",
            text=text,
        ),
    ]
    return cascade_pb2.GenerateResponse(
        **{
            "request_id": "r1",
            "text": text,
            "token_ids": [1, 2, 3],
            "finish_reason": finish,
            "stage": "large",
            "stage_index": 1,
            "p_correct": 0.75,
            "cost": 3.5,
            "latency_ms": 12.0,
            "plan_source": cascade_pb2.PLAN_SOURCE_POLICY,
            "policy_version": "p7",
            "stages": records,
            **fields,
        }
    )


class FakeRouter(cascade_pb2_grpc.CascadeServiceServicer):
    """Sends words, and then the answer.

    error: raised instead, or after `words_first` words. hold: while it is cleared, calls wait after those
    words. words: of streams. has_sent_all: whether a stream has had them all. token: refuses other ones.
    requests, metadata: what came. running: calls that have not ended; idle is set while there are none.
    """

    def __init__(self, stages=("small", "large")):
        self.stages = stages
        self.error = None
        self.words_first = 0
        self.token = ""
        self.words = WORDS
        self.has_sent_all = False
        self.requests = []
        self.metadata = []
        self.described = 0
        self.hold = asyncio.Event()
        self.hold.set()
        self.begun = asyncio.Event()
        self.idle = asyncio.Event()
        self.running = 0

    async def Describe(self, request, context):  # noqa: N802
        self._check(context)
        self.described += 1
        return cascade_pb2.DescribeResponse(
            stages=[
                cascade_pb2.StageDescription(stage=name, stage_index=index, model=f"m-{name}", available=True)
                for index, name in enumerate(self.stages)
            ],
            version="1",
        )

    async def Generate(self, request, context):  # noqa: N802
        with self._counted(request, context):
            await self._wait()
            return answer(request_id=f"r{len(self.requests)}")

    async def GenerateStream(self, request, context):  # noqa: N802
        with self._counted(request.request, context):
            yield cascade_pb2.GenerateStreamResponse(stage_started=cascade_pb2.StageStarted(stage="small"))
            for count, word in enumerate(self.words):
                if count == self.words_first:
                    await self._wait()
                tokens = common_pb2.TokenChunk(token_ids=[count + 1], text=word)
                commit = cascade_pb2.Commit(committed_tokens=count + 1, tokens=tokens)
                yield cascade_pb2.GenerateStreamResponse(commit=commit)
            self.has_sent_all = True
            yield cascade_pb2.GenerateStreamResponse(response=answer(request_id=f"r{len(self.requests)}"))

    async def start(self, options=None, port=0):
        """Serve on a port; return the server and the port. 0: a free one."""
        service = ServiceRegistration("asd.v1.CascadeService", self._add)
        return await start_server(f"127.0.0.1:{port}", [service], options=options or ServerOptions())

    def _add(self, server):
        cascade_pb2_grpc.add_CascadeServiceServicer_to_server(self, server)

    async def _wait(self):
        self.begun.set()
        await self.hold.wait()
        if self.error:
            raise self.error

    def _check(self, context):
        metadata = dict(context.invocation_metadata())
        self.metadata.append(metadata)
        if self.token and metadata.get("authorization") != f"Bearer {self.token}":
            raise Unauthenticated("this cascade does not know the token")

    def _counted(self, request, context):
        self._check(context)
        self.requests.append(request)
        return _Counted(self)


class _Counted:
    def __init__(self, router):
        self._router = router

    def __enter__(self):
        self._router.running += 1
        self._router.idle.clear()

    def __exit__(self, *_):
        self._router.running -= 1
        if not self._router.running:
            self._router.idle.set()
