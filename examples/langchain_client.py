"""A LangChain chain whose model is steered.

expertsteer serve smollm2-135m-instruct --pack happy.safetensors
python examples/langchain_client.py http://127.0.0.1:8000/v1 happy "the sea"
"""

import os
import sys

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from openai import OpenAI

address, pack, topic = sys.argv[1:4]
key = os.environ.get("EXPERTSTEER_API_KEY", "none")
model = OpenAI(base_url=address, api_key=key).models.list().data[0].id
unsteered = ChatOpenAI(base_url=address, api_key=key, model=model, temperature=0, max_tokens=20)
steered = unsteered.model_copy(update={"extra_body": {"steering": {"pack": pack, "strength": 0.1}}})
prompt = ChatPromptTemplate.from_template("Write a sentence about {topic}.")

for name, chat in (("unsteered", unsteered), ("steered", steered)):
    chain = prompt | chat | StrOutputParser()
    print(f"{name}:", chain.invoke({"topic": topic}))
