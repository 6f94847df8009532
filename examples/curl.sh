#!/usr/bin/env bash
# loraplex with curl alone: bash examples/curl.sh [URL]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/adapters"
URL=${1:-http://127.0.0.1:8000}

call() { curl -sS --fail-with-body "$@"; echo; }
chat() {
    call "$URL/v1/chat/completions" -H 'Content-Type: application/json' -d '{
        "model": "'"$1"'", "temperature": 0, "max_tokens": 48,
        "messages": [{"role": "user", "content": "What is a river?"}]}'
}

echo "--- what can be called"
call "$URL/v1/models"

echo "--- the base model, then an adapter of it"
chat SmolLM2-135M-Instruct
chat pirate

echo "--- an adapter of one's own: the two files that PEFT writes; again with another name, it is called at once"
call -X PUT "$URL/v1/adapters/curl-demo" -F config=@pirate/adapter_config.json -F weights=@pirate/adapter_model.safetensors
chat curl-demo

echo "--- streamed, word by word"
call -N "$URL/v1/completions" -H 'Content-Type: application/json' -d '{
    "model": "curl-demo", "prompt": "The sea is", "max_tokens": 8, "temperature": 0, "stream": true}'

echo "--- two adapters at once, each with its weight"
call "$URL/v1/chat/completions" -H 'Content-Type: application/json' -d '{
    "model": "SmolLM2-135M-Instruct", "adapters": [{"name": "pirate", "weight": 0.7}, {"name": "headline", "weight": 0.5}],
    "messages": [{"role": "user", "content": "What is a lighthouse?"}], "temperature": 0, "max_tokens": 24}'

echo "--- and gone again"
call -X DELETE "$URL/v1/adapters/curl-demo"
