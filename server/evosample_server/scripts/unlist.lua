-- Takes a name out of its project's index, unless it is held for somebody who is about to make its head.
-- KEYS: samples, names. ARGV: name, time in seconds: what was reserved since is kept.
local held = redis.call('HGET', KEYS[1], ARGV[1])
local reserved_s = held and string.match(held, ' (%d+)')
if reserved_s and tonumber(reserved_s) >= tonumber(ARGV[2]) then
  return
end
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HDEL', KEYS[1], ARGV[1])
