-- Ends an epoch without the ranks that have not finished it: OPEN -> SEALED.
-- KEYS: head. ARGV: uid, epoch, plan_id, generation; '1' to do it at once, '0' once the straggler time-out is over.
-- Returns 1, or 0 if it is too early or the head has changed.
local h = redis.call('HMGET', KEYS[1], 'uid', 'epoch', 'plan_id', 'generation', 'state', 'straggler_timeout_ms', 'finish_began_ms')
for i = 1, 4 do
  if h[i] ~= ARGV[i] then
    return 0
  end
end
if h[5] ~= 'open' then
  return 0
end
if ARGV[5] == '0' then
  local now = redis.call('TIME')
  local timeout_ms, began_ms = tonumber(h[6]), tonumber(h[7])
  if timeout_ms == 0 or began_ms == 0 or now[1] * 1000 + now[2] / 1000 < began_ms + timeout_ms then
    return 0
  end
end
redis.call('HSET', KEYS[1], 'state', 'sealed')
return 1
