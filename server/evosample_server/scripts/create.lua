-- No head -> a head without a planned epoch.
-- KEYS: head. ARGV: field, value, ... Returns 1, or 0 if there is one already.
if redis.call('EXISTS', KEYS[1]) == 1 then
  return 0
end
redis.call('HSET', KEYS[1], unpack(ARGV))
return 1
