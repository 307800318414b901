#!/usr/bin/env bash
# The quick tests and the contract with each version of Transformers that we promise: the first with the seam we use, the one that serving
# engines pin, the last that calls a cache `past_key_values`, and the newest. Each in an environment of its own under
# out/, and all of them, whatever fails. Further arguments go to pytest.
#
#   bash scripts/test_versions.sh
#   VERSIONS="5.18.0" bash scripts/test_versions.sh -k generate
set -euo pipefail
cd "$(dirname "$0")/.."

failed=()
for version in ${VERSIONS:-5.18.0 5.19.0 5.23.0 5.24.0}; do
    environment="out/transformers-$version"
    mkdir -p "$environment"
    sed "s/^transformers==.*/transformers==$version/" constraints.txt > "$environment/constraints.txt"
    python3 -m venv "$environment"
    "$environment/bin/pip" install --quiet -c "$environment/constraints.txt" -e ".[demo,test]"
    echo "== transformers $version"
    "$environment/bin/python" -m pytest -m "quick or contract" "$@" || failed+=("$version")
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED with transformers ${failed[*]}"
    exit 1
fi
