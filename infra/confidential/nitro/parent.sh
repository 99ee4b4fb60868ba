#!/bin/sh
# On the parent instance: forward KMS out of the enclave, and the API into it.
set -e
: "${AWS_REGION:?the region of the key}"
vsock-proxy 8443 "kms.${AWS_REGION}.amazonaws.com" 443 &
nitro-cli run-enclave --eif-path pilotlight.eif --cpu-count 4 --memory 16384 --enclave-cid 16
# The enclave waits for the credentials, in the form of ~/.aws/credentials.
until socat -u FILE:"${CREDENTIALS:?a file in the form of ~/.aws/credentials}" VSOCK-CONNECT:16:7000; do sleep 1; done
exec socat TCP-LISTEN:8000,fork,reuseaddr VSOCK-CONNECT:16:8000
