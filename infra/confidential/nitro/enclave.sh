#!/bin/sh
# Inside the enclave: no network but vsock. 8000 comes in from the parent; KMS goes out through the parent's vsock-proxy.
set -e
ip link set lo up
socat TCP-LISTEN:8443,bind=127.0.0.1,fork,reuseaddr VSOCK-CONNECT:3:8443 &
# Temporary credentials for kms:Decrypt come from the parent once, before anything else; alone they decrypt nothing.
export AWS_SHARED_CREDENTIALS_FILE=/run/credentials
socat -u VSOCK-LISTEN:7000 OPEN:/run/credentials,creat,trunc,mode=600
socat VSOCK-LISTEN:8000,fork TCP:127.0.0.1:8000 &
# The name has to be that of the certificate which KMS shows, so the loopback answers to it.
echo "127.0.0.1 kms.${AWS_REGION}.amazonaws.com" >> /etc/hosts
export AWS_ENDPOINT_URL_KMS="https://kms.${AWS_REGION}.amazonaws.com:8443"
exec pilotlight serve --config /etc/pilotlight/pilotlight.toml --port 8000
