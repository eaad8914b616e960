"""Drives a running service with the real `openai` client: python openai_client.py http://127.0.0.1:PORT

Prints one line a check and exits with 0 only if all held.
"""

import io
import json
import sys
import time

import openai

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="sk-local", max_retries=0)
jobs = client.fine_tuning.jobs


def until(job, *statuses):
    for _ in range(600):
        shown = jobs.retrieve(job.id)
        if shown.status in statuses:
            return shown
        time.sleep(0.1)
    raise AssertionError(f"{job.id} is {shown.status}, not {statuses}")


line = {"messages": [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong, said the wall"}]}
content = (json.dumps(line) + "\n") * 60
file = client.files.create(file=("talk.jsonl", io.BytesIO(content.encode())), purpose="fine-tune")
assert client.files.wait_for_processing(file.id).status == "processed"
assert client.files.content(file.id).text == content
assert file.id in [one.id for one in client.files.list(purpose="fine-tune")]
print("files")

assert "gpt-tiny" in [model.id for model in client.models.list()]
job = jobs.create(
    model="gpt-tiny",
    training_file=file.id,
    seed=1,
    suffix="wall",
    metadata={"team": "a"},
    method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
    extra_body={"patrickstar": {"checkpoint.every": 5}},
)
done = until(job, "succeeded", "failed")
assert done.status == "succeeded" and done.error is None, done
assert client.models.retrieve(done.fine_tuned_model).id == done.fine_tuned_model
print("job", done.fine_tuned_model)

events = list(jobs.list_events(job.id, limit=3))
assert len({event.id for event in events}) == len(events) > 10
assert events[-1].message.startswith("Created fine-tuning job")
losses = [event.data["train_loss"] for event in reversed(events) if event.type == "metrics"]
assert losses[-1] < losses[0], losses
checkpoints = list(jobs.checkpoints.list(job.id, limit=1))
assert [one.step_number for one in checkpoints] == sorted((one.step_number for one in checkpoints), reverse=True)
assert checkpoints[0].metrics.train_loss == losses[-1]
table = client.files.content(done.result_files[0]).text
assert len(table.splitlines()) == len(losses) + 1
print("events, checkpoints, results")

more = [jobs.create(model="gpt-tiny", training_file=file.id, extra_body={"patrickstar": {"train.steps": 2}}) for _ in range(5)]
listed = [one.id for one in jobs.list(limit=2)]
assert listed == [one.id for one in reversed(more)] + [job.id], listed
assert [one.id for one in jobs.list(metadata={"team": "a"})] == [job.id]
print("lists")

long = jobs.create(model="gpt-tiny", training_file=file.id, extra_body={"patrickstar": {"train.steps": 1000000, "priority": 1}})
until(long, "running")
if hasattr(jobs, "pause"):
    assert jobs.pause(long.id).status == "paused"
    assert jobs.resume(long.id).status == "queued"
assert jobs.cancel(long.id).status == "cancelled"
try:
    jobs.cancel(long.id)
    raise AssertionError("a cancelled job was cancelled again")
except openai.BadRequestError as error:
    assert error.code == "invalid_job_state", error
try:
    jobs.retrieve("ftjob-none")
    raise AssertionError("there is no such job")
except openai.NotFoundError as error:
    assert error.code == "not_found", error
try:
    jobs.create(model="gpt-tiny", training_file=file.id, extra_body={"patrickstar": {"train": {"step": 1}}})
    raise AssertionError("an unknown key was accepted")
except openai.BadRequestError as error:
    assert "did you mean `train.steps`" in error.message, error
print("pause, resume, cancel, errors")

wish = {"model": done.fine_tuned_model, "prompt": "ping", "max_tokens": 12, "seed": 7}
whole = client.completions.create(**wish)
assert whole.usage.completion_tokens == 12 and whole.choices[0].finish_reason == "length", whole
pieces = [piece.choices[0].text for piece in client.completions.create(stream=True, **wish)]
assert len(pieces) > 3 and "".join(pieces) == whole.choices[0].text, (pieces, whole)
asked = {"model": checkpoints[-1].id, "messages": line["messages"][:1], "max_tokens": 12, "seed": 7}
answer = client.chat.completions.create(**asked)
assert answer.choices[0].message.role == "assistant"
pieces = [piece.choices[0].delta.content or "" for piece in client.chat.completions.create(stream=True, **asked)]
assert "".join(pieces) == answer.choices[0].message.content, (pieces, answer)
try:
    client.completions.create(logprobs=3, **wish)
    raise AssertionError("logprobs were accepted")
except openai.BadRequestError as error:
    assert error.param == "logprobs", error
for one in more:
    until(one, "succeeded")
assert client.files.delete(file.id).deleted
print("completions; openai", openai.__version__)
