#!/usr/bin/python3 -I
"""Stands in for a key service, so that root-command.py can be tried without one. NOT a key service: it keeps plaintexts in memory.

    kms-stub.py TOKEN        serves on a free port of 127.0.0.1 and prints its URL; ends with its standard input
"""

import base64
import http.server
import json
import secrets
import sys
import threading

KEPT = {}


class Service(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.headers["authorization"] != "Bearer " + sys.argv[1]:
            return self.answer(403, {"message": "access denied"})
        context = json.dumps([asked["key"], asked["context"]], sort_keys=True)
        if self.path == "/encrypt":
            handle = base64.b64encode(secrets.token_bytes(24)).decode()
            KEPT[handle] = (context, asked["plaintext"])
            return self.answer(200, {"ciphertext": handle, "version": 1})
        kept = KEPT.get(asked["ciphertext"])
        if self.path == "/decrypt" and kept and kept[0] == context:
            return self.answer(200, {"plaintext": kept[1]})
        return self.answer(400, {"message": "this does not open"})

    def answer(self, code, body):
        text = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


def main():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
