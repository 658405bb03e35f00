"""Choose what steers each request, with the openai client.

expertsteer serve smollm2-135m-instruct --pack happy.safetensors
python examples/openai_client.py http://127.0.0.1:8000/v1 happy "How was your day?"
"""

import os
import sys

from openai import OpenAI

address, pack, question = sys.argv[1:4]
client = OpenAI(base_url=address, api_key=os.environ.get("EXPERTSTEER_API_KEY", "none"))
model = client.models.list().data[0].id
options = {"model": model, "max_tokens": 20, "temperature": 0}
messages = [{"role": "user", "content": question}]

unsteered = client.chat.completions.create(messages=messages, **options)
print("unsteered:", unsteered.choices[0].message.content)

# One pack, or a list of packs, which add up.
steering = {"pack": pack, "strength": 0.1, "positions": "generated"}
stream = client.chat.completions.create(
    messages=messages, **options, stream=True, extra_body={"steering": steering}
)
print("steered: ", end="")
for piece in stream:
    print(piece.choices[0].delta.content or "", end="", flush=True)
print()
