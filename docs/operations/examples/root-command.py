#!/usr/bin/python3 -I
"""An example of root.command: wraps Ensign's master key with a key service that speaks JSON over HTTPS.

Ensign runs it without arguments and without an environment, so its settings lie beside it, in FILE.json, mode 0600:

    {"url": "https://kms.internal", "key": "ensign-root", "token": "..."}

The service is asked with POST /encrypt and POST /decrypt. Both get the key's name and a context (cluster and epoch), which the
service binds into what it makes, so that one cluster's master key does not open as another's. Adapt `ask` to the service that you have:
what Ensign gives and takes is in docs/operations/root-keys.md. Nothing secret is printed but the answer, and errors go to the log.
"""

import json
import sys
import urllib.error
import urllib.request

LIMIT = 64 << 10


def ask(settings, path, body):
    request = urllib.request.Request(
        settings["url"] + path,
        data=json.dumps({"key": settings["key"], **body}).encode(),
        headers={"authorization": "Bearer " + settings["token"], "content-type": "application/json"},
    )
    try:
        # Shorter than Ensign's own patience of ten seconds, so that the cause is told.
        with urllib.request.urlopen(request, timeout=8) as answer:
            return json.loads(answer.read(LIMIT))
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"the key service answers {error.code}: {error.read(200).decode(errors='replace')}") from None
    except OSError as error:
        raise RuntimeError(f"the key service cannot be reached: {error}") from None


def run(settings, asked):
    if asked["version"] != 1:
        raise RuntimeError(f"version {asked['version']} of the protocol is not known here")
    context = {"cluster": asked["cluster"], "epoch": asked["epoch"]}
    if asked["operation"] == "wrap":
        made = ask(settings, "/encrypt", {"plaintext": asked["key"], "context": context})
        return {"key_id": settings["key"], "key_version": made["version"], "blob": made["ciphertext"]}
    if asked["operation"] == "unwrap":
        if asked["key_id"] != settings["key"]:
            raise RuntimeError(f"the vault needs key {asked['key_id']!r}, and {settings['key']!r} is set here")
        opened = ask(settings, "/decrypt", {"ciphertext": asked["blob"], "context": context})
        return {"key": opened["plaintext"]}
    raise RuntimeError(f"operation {asked['operation']!r} is not known here")


def main():
    try:
        with open(__file__ + ".json", encoding="utf-8") as file:
            settings = json.load(file)
        answer = run(settings, json.loads(sys.stdin.buffer.read(LIMIT)))
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        answer = {"error": str(error)}
    json.dump(answer, sys.stdout)
    return 1 if "error" in answer else 0


if __name__ == "__main__":
    sys.exit(main())
