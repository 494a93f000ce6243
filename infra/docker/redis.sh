#!/bin/sh
# Starts the official Redis image with our users and the passwords of the environment. The user `default` is off.
set -eu

for password in "${OPERATOR_PASSWORD:?}" "${API_PASSWORD:?}" "${CONTROLLER_PASSWORD:?}" "${SIDECAR_PASSWORD:?}"; do
  case "$password" in
  *[!A-Za-z0-9._~-]*)
    echo "the passwords stand in URLs: use letters, digits and . _ ~ - only" >&2
    exit 1
    ;;
  esac
done

umask 077
sed -e "s/>OPERATOR_PASSWORD />$OPERATOR_PASSWORD /" -e "s/>API_PASSWORD />$API_PASSWORD /" \
  -e "s/>CONTROLLER_PASSWORD />$CONTROLLER_PASSWORD /" -e "s/>SIDECAR_PASSWORD />$SIDECAR_PASSWORD /" \
  /usr/local/etc/fnqueue-users.acl >/usr/local/etc/users.acl
chown redis /usr/local/etc/users.acl
umask 022
unset OPERATOR_PASSWORD API_PASSWORD CONTROLLER_PASSWORD SIDECAR_PASSWORD

exec docker-entrypoint.sh redis-server /usr/local/etc/redis/redis.conf --aclfile /usr/local/etc/users.acl
