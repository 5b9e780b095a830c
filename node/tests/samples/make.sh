#!/bin/sh
# Makes the sample directory of a release: sh make.sh PATH-TO-ENSIGN CLUSTER-VERSION. See README.md.
set -eu
ensign=$(realpath "$1")
to=$(dirname "$(realpath "$0")")/$2
work=$(mktemp -d)
server=
trap 'test -z "$server" || kill "$server"; rm -rf "$work"' EXIT
cd "$work"
"$ensign" dev --nodes 1 --data data --grpc 127.0.0.1:0 --http 127.0.0.1:0 --metrics 127.0.0.1:0 >log 2>&1 &
server=$!
for _ in $(seq 120); do
    if grep -q '^ready' log; then break; fi
    kill -0 "$server" || { cat log; exit 1; }
    sleep 0.5
done
ENSIGN_CREDENTIALS=$work/ensign-dev.json
export ENSIGN_CREDENTIALS

events() { seq "$1" "$2" | sed 's/.*/{"order":&,"of":"a customer"}/'; }
for topic in orders notes gone; do "$ensign" topic create $topic >/dev/null; done
events 1 300 | "$ensign" publish orders >/dev/null
# Three versions of the ring: one that reads, one that was destroyed with what it sealed, and the active one.
"$ensign" key rotate >/dev/null
seq 1 20 | "$ensign" publish gone --mimetype text/plain >/dev/null
"$ensign" topic destroy gone --yes >/dev/null
"$ensign" key revoke --version 2 --yes >/dev/null
"$ensign" key rotate >/dev/null
events 301 600 | "$ensign" publish orders >/dev/null
seq 1 40 | "$ensign" publish notes --mimetype text/plain --key-value unit=metre --key-value by=hand >/dev/null
"$ensign" topic archive notes --yes >/dev/null
"$ensign" apikey create second --save second.json >/dev/null
# What the release before did not have; later releases add theirs here.
if "$ensign" quota --help >/dev/null 2>&1; then
    "$ensign" quota set --default --topics 50 >/dev/null
    "$ensign" topic create bulk-1 bulk-2 bulk-3 >/dev/null
fi
if "$ensign" key create --help >/dev/null 2>&1; then
    "$ensign" key set --rotation 730d >/dev/null
    "$ensign" key create spare --algorithm AES128_GCM >/dev/null
    "$ensign" key rotate --ring spare >/dev/null
    "$ensign" key disable --ring spare --version 1 --yes >/dev/null
    "$ensign" key schedule-revoke --ring spare --version 2 --after 365d --yes >/dev/null
fi
topics="orders notes"
if "$ensign" apikey describe --help >/dev/null 2>&1; then
    "$ensign" key create keeper >/dev/null
    "$ensign" topic create kept --key keeper >/dev/null
    seq 1 30 | "$ensign" publish kept --mimetype text/plain >/dev/null
    "$ensign" apikey create third --own-ring --save third.json >/dev/null
    seq 31 40 | ENSIGN_CREDENTIALS=third.json "$ensign" publish kept --mimetype text/plain >/dev/null
    topics="$topics kept"
fi
mkdir -p "$to"
for topic in $topics; do "$ensign" query "SELECT * FROM $topic" --output json >"$to/$topic.jsonl"; done
kill "$server"
wait "$server" || true
server=
# Room that was written ahead is zeros, which become holes.
tar --create --sparse --hole-detection=raw --sort=name --owner=0 --group=0 --numeric-owner data | gzip -9n >"$to/data.tar.gz"
for topic in $topics; do gzip -9nf "$to/$topic.jsonl"; done
ls -l "$to"
