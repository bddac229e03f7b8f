-- What a member's call is checked against, in one go.
-- KEYS: head, claims. ARGV: rank
-- Returns {the head: {field, value, ...}, claim of the rank's latest process (false if there is none)}.
return {redis.call('HGETALL', KEYS[1]), redis.call('HGET', KEYS[2], ARGV[1])}
