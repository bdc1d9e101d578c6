"""LangChain and LiteLLM's SDK."""

from __future__ import annotations

QUESTION = "Max has 9 beads. Max finds 10 more. How many beads does Max have now?"


def test_langchain(api):
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model="asd", base_url=api, api_key="none", temperature=0)
    answer = model.invoke(QUESTION)
    assert "19" in answer.content
    assert answer.usage_metadata["output_tokens"] > 0
    assert "19" in "".join(chunk.content for chunk in model.stream(QUESTION))


def test_litellm(api):
    import litellm

    turns = [{"role": "user", "content": QUESTION}]
    answer = litellm.completion(model="openai/asd", messages=turns, api_base=api, api_key="none")
    assert "19" in answer.choices[0].message.content
    stream = litellm.completion(model="openai/asd", messages=turns, api_base=api, api_key="none", stream=True)
    assert "19" in "".join(chunk.choices[0].delta.content or "" for chunk in stream)
